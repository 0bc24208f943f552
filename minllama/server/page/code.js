// The request that the form stands for, as a shell command and as a program. Neither holds the key.

const VARIABLE = "MINLLAMA_API_KEY";
const NOT_OPENAI = ["top_k", "min_p", "repetition_penalty"]; // not arguments of the openai client

/** JSON in lines of a bearable width. */
const pretty = (value) => literal(value, "", "  ", {});

const python = (value, indent = "") =>
  literal(value, indent, "    ", { true: "True", false: "False", null: "None" });

function literal(value, indent, step, words) {
  if (typeof value === "string") return JSON.stringify(value);
  if (value === null || typeof value !== "object") return words[value] ?? JSON.stringify(value);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const inner = indent + step;
  const parts = Array.isArray(value)
    ? value.map((each) => literal(each, inner, step, words))
    : Object.entries(value).map(
        ([name, each]) => `${JSON.stringify(name)}: ${literal(each, inner, step, words)}`,
      );
  const flat = open + parts.join(", ") + close;
  if (flat.length + indent.length <= 76 && !flat.includes("\n")) return flat;
  return `${open}\n${inner}${parts.join(`,\n${inner}`)}\n${indent}${close}`;
}

function asCurl(path, body) {
  const quoted = `'${pretty(body).replaceAll("'", "'\\''")}'`;
  const parts = [`curl ${body.stream ? "-N " : ""}${location.origin}${path}`];
  if (needsKey) parts.push(`-H "Authorization: Bearer $${VARIABLE}"`);
  parts.push("-H 'Content-Type: application/json'", `-d ${quoted}`);
  return parts.join(" \\\n  ");
}

function asPython(path, body) {
  const secret = needsKey ? `os.environ["${VARIABLE}"]` : '"none"';
  if (!path.startsWith("/v1/")) return withUrllib(path, body, secret);
  const known = Object.entries(body).filter(
    ([name]) => !NOT_OPENAI.includes(name) && name !== "stream_options",
  );
  const others = Object.fromEntries(NOT_OPENAI.filter((n) => n in body).map((n) => [n, body[n]]));
  const given = known.map(([name, value]) => `    ${name}=${python(value, "    ")},`);
  if (Object.keys(others).length) given.push(`    extra_body=${python(others, "    ")},`);
  const [method, name, use] = {
    "/v1/decisions": ["decisions", "decision", "for answer in decision.answers:\n    print(answer)"],
    "/v1/completions": [
      "completions",
      "stream",
      'for chunk in stream:\n    if chunk.choices:\n        print(chunk.choices[0].text, end="", flush=True)',
    ],
    "/v1/chat/completions": [
      "chat.completions",
      "stream",
      'for chunk in stream:\n    if chunk.choices:\n        print(chunk.choices[0].delta.content or "", end="", flush=True)',
    ],
  }[path];
  return [
    ...(needsKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key=${secret})`,
    `${name} = client.${method}.create(`,
    ...given,
    ")",
    use,
  ].join("\n");
}

function withUrllib(path, body, secret) {
  const auth = needsKey ? `, "Authorization": "Bearer " + ${secret}` : "";
  return [
    "import json",
    ...(needsKey ? ["import os"] : []),
    "import urllib.request",
    "",
    `body = ${python(body)}`,
    "request = urllib.request.Request(",
    `    "${location.origin}${path}",`,
    "    json.dumps(body).encode(),",
    `    {"Content-Type": "application/json"${auth}},`,
    ")",
    "with urllib.request.urlopen(request) as response:",
    "    print(json.load(response))",
  ].join("\n");
}

/** Fill a `details` with the code of what `ask()` gives as [path, body]; returns its renewal. */
function codeView(details, name, ask) {
  const shown = make("pre", { tabindex: "0", "aria-label": "Code of the request", role: "group" });
  const done = make("span", { class: "hint", role: "status" });
  const kinds = [["curl", "curl", asCurl], ["python", "Python", asPython]];
  const choices = kinds.flatMap(([kind, words], i) => [
    make("input", { type: "radio", name: `code-${name}`, id: `${name}-${kind}`, value: kind, checked: i === 0 }),
    make("label", { for: `${name}-${kind}` }, words),
  ]);
  const copy = make("button", { type: "button", class: "quiet" }, "Copy");
  const renew = () => {
    if (!details.open) return;
    const chosen = $("input:checked", details).value;
    try {
      shown.textContent = kinds.find(([kind]) => kind === chosen)[2](...ask());
    } catch (error) {
      shown.textContent = error instanceof Trouble ? error.message : String(error);
    }
    done.textContent = "";
  };
  copy.addEventListener("click", async () => {
    done.textContent = (await copied(shown.textContent, shown)) ? "Copied." : "Press Ctrl+C.";
  });
  details.append(
    make("fieldset", { class: "choices" }, make("legend", { class: "unseen" }, "Language"), ...choices),
    shown,
    make("div", { class: "actions copy" }, copy, done),
  );
  details.addEventListener("toggle", renew);
  details.addEventListener("change", renew);
  return renew;
}

/** Whether a text could be put on the clipboard; else it is selected, where it stands. */
async function copied(text, element) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    getSelection().selectAllChildren(element); // no clipboard beyond https and this machine
    return false;
  }
}
