// The server: its key, its answers, its streams, and its errors in words.

const KEY = "minllama-key";
const key = {
  value: "", // where the browser keeps nothing, until the page is left
  get: () => key.value,
  set(value) {
    key.value = value;
    try {
      if (value) sessionStorage.setItem(KEY, value);
      else sessionStorage.removeItem(KEY);
    } catch {
      // the browser is told to keep nothing
    }
  },
  forget: () => key.set(""),
};
try {
  key.value = sessionStorage.getItem(KEY) || "";
} catch {
  // as above
}
let needsKey = false; // whether the server has asked for one

/** What the server, or the way to it, has refused. */
class Trouble extends Error {
  constructor(words, status = 0, retryAfter = 0) {
    super(words);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The message in an error's body, in the form of any protocol. */
function messageOf(content) {
  const error = content && typeof content === "object" ? content.error ?? content.detail : null;
  if (typeof error === "string") return error;
  if (Array.isArray(error)) {
    return error.map((each) => `${(each.loc || []).join(".")}: ${each.msg}`).join("; ");
  }
  return error && typeof error.message === "string" ? error.message : "";
}

/** Words of the server as they are: they may begin with the name of a field. */
const quoted = (words) => `The server says: ${words}${/[.!?…]$/.test(words) ? "" : "."}`;

async function troubleOf(response) {
  let said = "";
  try {
    said = messageOf(await response.json());
  } catch {
    // no JSON: the status says what can be said
  }
  const seconds = Number(response.headers.get("Retry-After")) || 0;
  const again = seconds ? ` Try again in ${seconds} s.` : "";
  const words = {
    401: key.get() ? "The server does not accept this key." : "This server needs an API key.",
    413: "The text is too large for this server.",
    429: "The server has too much to do at the moment.",
    503: "The server does not take requests at the moment.",
  }[response.status];
  const shown = said && response.status !== 401 ? quoted(said) : words;
  return new Trouble(
    (shown || `The server has answered with status ${response.status}.`) + again,
    response.status,
    seconds,
  );
}

/** A response that is not an error. */
async function request(path, body, signal) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server cannot be reached. Is it still running?");
  }
  if (response.status === 401) needsKey = true;
  if (!response.ok) throw await troubleOf(response);
  return response;
}

async function call(path, body, signal) {
  const response = await request(path, body, signal);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server's answer was cut off.");
  }
}

/** The events of a stream of OpenAI's API, parsed; it must end with [DONE]. */
async function* events(path, body, signal) {
  const response = await request(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data:")) continue; // a comment
        const data = part.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Trouble(quoted(messageOf(event) || "it has failed"));
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof Trouble || error.name === "AbortError") throw error;
    throw new Trouble("The connection was cut in the middle of the answer.");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new Trouble("The answer ended too early.");
}

/**
 * A form's running request: its buttons, Escape, and its errors in words.
 *
 * `work` is given an AbortSignal; `ended` is told whether it was stopped.
 */
function runner(form, { onKey }) {
  const [send, stop] = [$(".primary", form), $(".stop", form)];
  const trouble = $(".error", form);
  let running = null;
  stop.addEventListener("click", () => running && running.abort());
  form.closest("[role=tabpanel]").addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) running.abort();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  return async (work) => {
    if (running) return;
    running = new AbortController();
    tell(trouble, "");
    show(stop, true);
    const hadFocus = document.activeElement === send;
    send.disabled = true;
    if (hadFocus) stop.focus();
    try {
      await work(running.signal);
    } catch (error) {
      if (error.name !== "AbortError") {
        tell(trouble, error instanceof Trouble ? error.message : `This page has failed: ${error}`);
        if (error.status === 401) onKey(error.message);
      }
    } finally {
      const stopHadFocus = document.activeElement === stop;
      running = null;
      send.disabled = false;
      show(stop, false);
      if (stopHadFocus) send.focus();
    }
  };
}
