// Small helpers. Texts of users, models and the server are set as text, never as HTML.

const $ = (selector, inside = document) => inside.querySelector(selector);
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

/** An element with properties (`class`, `data-*`, `aria-*` and such as attributes) and children. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function show(element, isShown) {
  element.hidden = !isShown;
}

/** Say what went wrong in an element with role="alert"; nothing hides it. */
function tell(element, words) {
  element.textContent = words || "";
  show(element, Boolean(words));
}

/** `0.873`; very small and very large probabilities keep their inequality. */
function probability(p) {
  if (typeof p !== "number") return "–";
  if (p > 0 && p < 0.0005) return "< 0.001";
  if (p < 1 && p > 0.9995) return "> 0.999";
  return p.toFixed(3);
}

function percent(p) {
  if (p > 0 && p < 0.001) return "< 0.1 %";
  if (p < 1 && p > 0.999) return "> 99.9 %";
  return `${(100 * p).toFixed(1)} %`;
}

/** `+0.31` or `−0.31`, with a real minus. */
function signed(value, digits = 2) {
  const words = Math.abs(value).toFixed(digits);
  if (Number(words) === 0) return words;
  return (value < 0 ? "−" : "+") + words;
}

function number(value) {
  return Number.isInteger(value) ? String(value) : Number(value.toPrecision(4)).toString();
}

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

function fill(select, entries, chosen) {
  const before = chosen ?? select.value;
  select.replaceChildren(...entries.map(([value, words]) => make("option", { value }, words)));
  if (entries.some(([value]) => value === before)) select.value = before;
}

/** Scroll to where something new stands, unless its beginning can be seen. */
function bringIntoView(element) {
  const { top } = element.getBoundingClientRect();
  if (top >= 0 && top < innerHeight - 120) return;
  const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  element.scrollIntoView({ block: "start", behavior: isCalm ? "auto" : "smooth" });
}
