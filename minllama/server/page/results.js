// Answers: bars with probabilities, fields of the server's own, and words by their effects.

const MOST_BARS = 12;
const FIELD_WORDS = {
  label_mass: "label mass (how likely any of these answers was at all)",
  "calibration is_calibrated": "calibrated",
  "calibration temperature": "temperature of the calibration",
  "calibration n_texts": "texts that it was calibrated on",
  "calibration ece": "expected calibration error",
  "calibration ece_split": "measured on",
  "calibration ece_n_texts": "texts that it was measured on",
};

/** A table of names with probabilities and bars, most likely first unless in a given order. */
function bars(caption, entries, { isOrdered = false, head = "Label" } = {}) {
  const most = Math.max(...entries.map((entry) => entry.p));
  const listed = isOrdered ? entries : [...entries].sort((a, b) => b.p - a.p);
  const row = ({ name, p }) =>
    make(
      "tr",
      { class: p === most ? "first" : null },
      make("th", { scope: "row" }, name),
      make("td", { class: "number" }, probability(p)),
      make("td", { class: "bar", "aria-hidden": "true" }, make("i", { "--part": Math.min(1, Math.max(0, p)) })),
    );
  const body = make("tbody", {}, ...listed.slice(0, MOST_BARS).map(row));
  const table = make(
    "table",
    {},
    make("caption", { class: "unseen" }, caption),
    make(
      "thead",
      {},
      make("tr", {}, make("th", { scope: "col" }, head), make("th", { scope: "col", class: "number" }, "Probability"), make("td", {})),
    ),
    body,
  );
  if (listed.length <= MOST_BARS) return [table];
  const rest = make("button", { type: "button", class: "quiet more" }, `Show all ${listed.length}`);
  rest.addEventListener("click", () => {
    body.append(...listed.slice(MOST_BARS).map(row));
    rest.remove();
  });
  return [table, rest];
}

function facts(...words) {
  const shown = words.filter(Boolean).map((each) => make("span", {}, each));
  return make("p", { class: "facts" }, ...shown);
}

/** How far the most likely one is above chance, from 0 to 1: (max p - 1/n) / (1 - 1/n). */
function confidenceOf(probabilities) {
  const n = probabilities.length;
  return n < 2 ? 1 : (Math.max(...probabilities) - 1 / n) / (1 - 1 / n);
}

/** Fields that the server adds (`x_…`) and that are no lists, as a list of terms. */
function extras(answer) {
  const rows = [];
  const add = (name, value) => {
    if (value === null || value === undefined || Array.isArray(value)) return;
    if (typeof value === "object") {
      for (const [inner, each] of Object.entries(value)) add(`${name} ${inner}`, each);
      return;
    }
    const words = typeof value === "number" ? number(value) : { true: "yes", false: "no" }[value] ?? String(value);
    rows.push(make("dt", {}, FIELD_WORDS[name] ?? name.replaceAll("_", " ")), make("dd", {}, words));
  };
  for (const [name, value] of Object.entries(answer)) {
    if (name.startsWith("x_") && !name.includes("explanation")) add(name.slice(2), value);
  }
  return rows.length ? [make("dl", {}, ...rows)] : [];
}

/** The words of a text, colored by what leaving them out changes; signs and lines say it too. */
function explanation(text, given) {
  const target = make("select", { id: "explained" });
  const unit = make("select", { id: "unit" });
  const targets = given.targets;
  fill(target, targets.map((each, i) => [String(i), each.label]));
  const units = [["effects", targets[0].value === undefined ? "probability" : "predicted number"]];
  if (targets[0].log_odds_effects) units.push(["log_odds_effects", "log-odds"]);
  fill(unit, units);
  const shown = make("div");
  const renew = () => shown.replaceChildren(...explained(text, given, targets[Number(target.value)], unit.value));
  target.addEventListener("change", renew);
  unit.addEventListener("change", renew);
  renew();
  const control = (words, select) =>
    select.options.length > 1 ? make("div", {}, make("label", { for: select.id }, words), select) : null;
  const controls = [control("for the label", target), control("measured by", unit)].filter(Boolean);
  return [
    make("h3", {}, "What each word changed"),
    ...(controls.length ? [make("div", { class: "controls" }, ...controls)] : []),
    shown,
  ];
}

function explained(text, given, target, unit) {
  const effects = target[unit];
  const characters = Array.from(text); // offsets count characters, not UTF-16 units
  const most = Math.max(unit === "effects" && target.value === undefined ? 0.05 : 1e-9, ...effects.map((each) => Math.abs(each ?? 0)));
  const least = unit === "effects" && target.value === undefined ? 0.005 : most / 50;
  const parts = [];
  let at = 0;
  given.words.forEach((word, i) => {
    parts.push(characters.slice(at, word.start).join(""));
    const effect = effects[i];
    at = word.end;
    if (effect === null || Math.abs(effect) < least) {
      parts.push(word.text);
      return;
    }
    parts.push(
      make(
        "ruby",
        {},
        make("span", { class: effect > 0 ? "for" : "against", "--part": Math.abs(effect) / most }, word.text),
        make("rt", {}, signed(effect)),
      ),
    );
  });
  parts.push(characters.slice(at).join(""));
  return [
    make("p", { class: "words" }, ...parts),
    make(
      "p",
      { class: "hint legend" },
      make("span", {}, make("b", { class: "for" }, "+"), ` speaks for ${target.label}`),
      make("span", {}, make("b", { class: "against" }, "−"), " speaks against it"),
    ),
    make("p", { class: "hint" }, ...notes(given, target, unit)),
    strongest(given, effects),
  ];
}

function notes(given, target, unit) {
  const what = unit === "effects" ? (target.value === undefined ? "the probability" : "the predicted value") : "the log-odds";
  const words = [`A number says by how much ${what} of ${target.label} falls if the word is left out.`];
  if (given.n_words > given.words.length) words.push(` Neighboring words were left out together, as there are ${given.n_words}.`);
  if (given.n_unread) words.push(` ${given.n_unread} words did not fit into the model's context and were not read.`);
  return words;
}

function strongest(given, effects) {
  const order = effects.map((effect, i) => [effect ?? 0, i]).filter(([effect]) => effect);
  order.sort(([a], [b]) => Math.abs(b) - Math.abs(a));
  const rows = order.slice(0, 10).map(([effect, i]) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, given.words[i].text),
      make("td", { class: "number" }, signed(effect, 4)),
    ),
  );
  if (!rows.length) return make("p", { class: "hint" }, "No word changes the answer.");
  const head = make("tr", {}, make("th", { scope: "col" }, "Word"), make("th", { scope: "col", class: "number" }, "Effect"));
  return make(
    "details",
    {},
    make("summary", {}, "The strongest words as a table"),
    make("table", {}, make("caption", { class: "unseen" }, "The words with the largest effects"), make("thead", {}, head), make("tbody", {}, ...rows)),
  );
}
