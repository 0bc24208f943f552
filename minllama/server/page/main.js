// The page: tabs, the key, and the list of what is served.

let served = []; // entries of /v1/models
const RETRY_SECONDS = 2;

function chooseTab(tab, { hasFocus = false } = {}) {
  for (const each of all("[role=tab]")) {
    const isChosen = each === tab;
    each.setAttribute("aria-selected", String(isChosen));
    each.tabIndex = isChosen ? 0 : -1;
    show($(`#${each.getAttribute("aria-controls")}`), isChosen);
  }
  if (hasFocus) tab.focus();
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
}

function startTabs() {
  const tabs = all("[role=tab]");
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => chooseTab(tab));
    tab.addEventListener("keydown", (event) => {
      const next = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: -1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      chooseTab(tabs.at(next % tabs.length), { hasFocus: true });
    });
  });
  if (location.hash === "#write") chooseTab(tabs[1]);
}

/** Ask for the key; `words` say why. */
function askForKey(words) {
  show($("#key"), true);
  show($("#forget-key"), false);
  tell($("#key-trouble"), words);
  $("#key-value").setAttribute("aria-invalid", String(Boolean(key.get())));
  $("#key-value").focus();
}

function startKey(load) {
  $("#key").addEventListener("submit", (event) => {
    event.preventDefault();
    const given = $("#key-value").value.trim();
    if (!/^[!-~]+$/.test(given)) {
      askForKey("A key is of letters, digits and signs, without spaces.");
      return;
    }
    key.set(given);
    load({ isFirst: false });
  });
  $("#forget-key").addEventListener("click", () => {
    key.forget();
    served = [];
    $("#state").textContent = "";
    load({ isFirst: false });
  });
}

function start() {
  const renewals = [];
  const load = async ({ isFirst = true } = {}) => {
    const trouble = $("#trouble");
    try {
      served = (await call("/v1/models")).data;
      tell(trouble, "");
      $("#state").textContent = `${served.length} model${served.length === 1 ? "" : "s"} served`;
      if (!$("#key").hidden) {
        show($("#key"), false);
        $("#key-value").value = "";
        $("[role=tab][aria-selected=true]").focus();
      }
      show($("#forget-key"), Boolean(key.get()));
      if (isFirst && !served.some(({ x_kind }) => x_kind === "classifier")) $("#by-labels").checked = true;
    } catch (error) {
      if (error.status === 401) {
        tell(trouble, "");
        askForKey(error.message);
        return;
      }
      tell(trouble, error instanceof Trouble ? error.message : String(error));
      setTimeout(() => load({ isFirst }), 1000 * (error.retryAfter || RETRY_SECONDS));
    }
    renewals.forEach((renew) => renew());
  };
  renewals.push(startDecide(askForKey), startWrite(askForKey));
  startTabs();
  startKey(load);
  load();
}

start();
