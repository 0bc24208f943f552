// The tab that writes: on from a prompt, or in a chat; streamed, and stopped at any time.

const write = {
  form: $("#write-form"),
  written: $("#written"),
  chat: $("#chat"),
  messages: [], // of the chat, without the system message
  isChat: () => $("[name=form]:checked").value === "chat",
};
const STREAM_OPTIONS = { include_usage: true, continuous_usage_stats: true };
const INTEGERS = ["max_tokens", "top_k", "seed"];
const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];

/** The options that are set, by their names in OpenAI's API. */
function writeOptions() {
  const options = {};
  for (const name of NUMBERS) {
    const field = $(`#${name}`);
    const given = field.value.trim();
    field.removeAttribute("aria-invalid");
    if (!given) continue;
    const value = Number(given.replace(",", "."));
    if (!Number.isFinite(value) || (INTEGERS.includes(name) && !Number.isSafeInteger(value))) {
      field.setAttribute("aria-invalid", "true");
      $("#options").open = true;
      const kind = INTEGERS.includes(name) ? "a whole number" : "a number";
      throw new Trouble(`${$(`label[for=${name}]`).firstChild.textContent.trim()} must be ${kind}.`);
    }
    options[name] = value;
  }
  const escapes = { n: "\n", t: "\t", "\\": "\\" };
  const stops = $("#stop").value.split("\n").filter(Boolean);
  if (stops.length) options.stop = stops.map((stop) => stop.replace(/\\([nt\\])/g, (_, sign) => escapes[sign]));
  return options;
}

/** The request of the form as [path, body]. */
function writeRequest() {
  const common = { ...writeOptions(), stream: true, stream_options: STREAM_OPTIONS };
  const model = $("#write-model").value;
  if (!write.isChat()) return ["/v1/completions", { model, prompt: $("#prompt").value, ...common }];
  const system = $("#system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...write.messages];
  const content = $("#message").value;
  if (content.trim()) messages.push({ role: "user", content });
  else if (messages.length && write.messages.length) messages.pop(); // the request before
  return ["/v1/chat/completions", { model, messages, ...common }];
}

async function runWriting(signal) {
  const [path, body] = writeRequest();
  if (!body.model) throw new Trouble("No language model is served here.");
  if (body.prompt !== undefined && !body.prompt) throw new Trouble("Enter a prompt first.");
  if (body.messages && !$("#message").value.trim()) throw new Trouble("Enter a message first.");
  show($("#copy-text"), false);
  const turn = write.isChat() ? chatTurn() : promptTurn(body.prompt);
  turn.region.setAttribute("aria-busy", "true");
  const meter = newMeter();
  let isWhole = false;
  try {
    for await (const event of events(path, body, signal)) {
      if (event.usage) meter.tokens = event.usage.completion_tokens;
      const [choice] = event.choices;
      if (!choice) continue;
      const piece = choice.text ?? choice.delta.content ?? "";
      if (piece) {
        write.text += piece;
        turn.place.append(piece);
        keepAtEnd(turn.region);
        meter.count();
      }
      if (choice.finish_reason) meter.reason = choice.finish_reason;
    }
    isWhole = true;
  } catch (error) {
    meter.reason = error.name === "AbortError" ? "aborted" : "error";
    throw error;
  } finally {
    turn.done(isWhole || meter.reason === "aborted");
    turn.place.classList.remove("new");
    turn.region.removeAttribute("aria-busy");
    $("#speed").textContent = meter.words(true);
    show($("#copy-text"), write.text !== "");
  }
}

function promptTurn(prompt) {
  write.text = "";
  const place = make("span", { class: "new" });
  write.written.replaceChildren(make("span", { class: "given" }, prompt), place);
  bringIntoView(write.written);
  return { place, region: write.written, done: () => {} };
}

/** A turn of the chat: the message goes into it, and comes back if there was no reply. */
function chatTurn() {
  write.text = "";
  const field = $("#message");
  const message = { role: "user", content: field.value };
  const place = make("p", { class: "new" });
  if (!write.messages.length) write.chat.replaceChildren();
  const asked = make("div", { class: "message user" }, make("h3", {}, "You"), make("p", {}, message.content));
  const reply = make("div", { class: "message" }, make("h3", {}, $("#write-model").value), place);
  write.chat.append(asked, reply);
  field.value = "";
  keepAtEnd(write.chat, true);
  bringIntoView(write.chat);
  const done = (isKept) => {
    if (isKept && write.text) {
      write.messages.push(message, { role: "assistant", content: write.text });
    } else {
      asked.remove();
      reply.remove();
      if (!field.value) field.value = message.content;
      if (!write.messages.length) write.chat.replaceChildren(emptyChat());
    }
    show($("#clear-chat"), write.messages.length > 0);
    write.renewCode();
  };
  return { place, region: write.chat, done };
}

const emptyChat = () => make("p", { class: "empty" }, "The conversation appears here.");

function keepAtEnd(region, isForced = false) {
  const below = region.scrollHeight - region.scrollTop - region.clientHeight;
  if (isForced || below < 80) region.scrollTop = region.scrollHeight;
}

/** Tokens and seconds of an answer. */
function newMeter() {
  const begun = performance.now();
  let [first, last, nFirst] = [0, 0, 0]; // nFirst tokens came at first
  let shownAt = begun;
  const meter = {
    reason: "",
    tokens: 0,
    count() {
      last = performance.now();
      if (!first) [first, nFirst] = [last, meter.tokens];
      if (last - shownAt > 250) {
        shownAt = last;
        $("#speed").textContent = meter.words(false);
      }
    },
    words(isEnd) {
      const n = meter.tokens;
      // From the first event to the last one; all together if there was only one.
      const [more, seconds] = n > nFirst && last > first ? [n - nFirst, last - first] : [n, last - begun];
      const rate = first ? `${((1000 * more) / seconds).toFixed(1)} tokens/s` : "";
      const reasons = {
        stop: "ended by itself or at a stop string",
        length: "reached the most new tokens",
        aborted: "stopped",
        error: "cut by an error",
      };
      const parts = [isEnd && reasons[meter.reason], `${n} token${n === 1 ? "" : "s"}`, rate];
      if (isEnd && first) parts.push(`first after ${((first - begun) / 1000).toFixed(2)} s`);
      return parts.filter(Boolean).join(" · ");
    },
  };
  $("#speed").textContent = "Writing …";
  return meter;
}

/** Show the fields of the chosen form, and what the model can. */
function renewWrite() {
  const models = served.filter(({ x_kind }) => x_kind !== "classifier");
  fill($("#write-model"), models.map(({ id }) => [id, id]));
  const chosen = models.find(({ id }) => id === $("#write-model").value);
  const canChat = !chosen || chosen.x_has_chat_template !== false;
  $("#form-chat").disabled = !canChat;
  if (!canChat && write.isChat()) $("#form-prompt").checked = true;
  const hint = served.length && !models.length ? "No language model is served, only classifiers." : "";
  $("#form-hint").textContent = hint || (canChat ? "" : "This model has no chat template; it continues prompts.");
  const form = write.isChat() ? "chat" : "prompt";
  for (const field of all("[data-form]", $("#write"))) {
    if (field.id !== "clear-chat") show(field, field.dataset.form === form);
  }
  show($("#clear-chat"), form === "chat" && write.messages.length > 0);
  $(".primary", write.form).textContent = form === "chat" ? "Send" : "Write";
}

function startWrite(onKey) {
  const run = runner(write.form, { onKey });
  write.text = "";
  write.renewCode = codeView($(".code", write.form), "write", writeRequest);
  const renew = () => {
    renewWrite();
    write.renewCode();
  };
  write.form.addEventListener("submit", (event) => {
    event.preventDefault();
    run(runWriting);
  });
  write.form.addEventListener("change", renew);
  write.form.addEventListener("input", write.renewCode);
  $("#message").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || event.isComposing) return;
    event.preventDefault();
    write.form.requestSubmit();
  });
  $("#clear-chat").addEventListener("click", () => {
    $(".stop", write.form).click();
    write.messages = [];
    write.chat.replaceChildren(emptyChat());
    $("#speed").textContent = "";
    show($("#copy-text"), false);
    $("#message").focus();
    renew();
  });
  $("#copy-text").addEventListener("click", async () => {
    const region = write.isChat() ? write.chat : write.written;
    $("#speed").textContent = (await copied(write.text, region)) ? "Copied." : "Press Ctrl+C.";
  });
  return renew;
}
