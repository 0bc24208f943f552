// The editor of questions, and answers to them.

const KINDS = [
  ["predicate", "Is it true?"],
  ["choice", "Which one?"],
  ["score", "How much?"],
];
const INSTRUCTIONS = {
  predicate: "The writer recommends it.",
  choice: "What is it about?",
  score: "How pleased is the writer?",
};
const OPTIONS = {
  choice: "a book or film: something to read or watch\na product: something one can buy\nsomething else",
  score: "not at all\na little\nvery",
};
let nQuestions = 0;

/** Add a question; `changed` is called when it is removed. */
function addQuestion(place, changed, kind = "predicate") {
  const id = `question-${++nQuestions}`;
  const select = make("select", { id: `${id}-kind`, "data-part": "kind" });
  fill(select, KINDS, kind);
  const instructions = make("textarea", { id: `${id}-instructions`, rows: "2", "data-part": "instructions" });
  const options = make("textarea", { id: `${id}-options`, rows: "3", "data-part": "options", "aria-describedby": `${id}-hint` });
  const label = make("label", { for: options.id });
  const hint = make("p", { class: "hint", id: `${id}-hint` });
  const field = make("div", {}, label, options, hint);
  const remove = make("button", { type: "button", class: "quiet" }, "Remove");
  const question = make(
    "fieldset",
    { class: "question" },
    make("legend"),
    make("div", {}, make("label", { for: select.id }, "Kind"), select),
    make("div", {}, make("label", { for: instructions.id }, "Question or statement"), instructions),
    field,
    make("div", {}, remove),
  );
  const renew = (before) => {
    const now = select.value;
    show(field, now !== "predicate");
    label.textContent = now === "score" ? "Levels, from the lowest" : "Choices";
    hint.textContent = "One on each line; after a colon, when it applies.";
    if (!instructions.value || instructions.value === INSTRUCTIONS[before]) instructions.value = INSTRUCTIONS[now];
    if (!options.value || options.value === OPTIONS[before]) options.value = OPTIONS[now] ?? "";
  };
  let before = kind;
  select.addEventListener("change", () => {
    renew(before);
    before = select.value;
  });
  remove.addEventListener("click", () => {
    question.remove();
    countQuestions(place);
    changed();
    ($(".question select", place) || $("#add-question")).focus();
  });
  renew(kind);
  place.append(question);
  countQuestions(place);
  return question;
}

function countQuestions(place) {
  const questions = all(".question", place);
  questions.forEach((question, i) => {
    $("legend", question).textContent = `Question ${i + 1}`;
    const remove = $("button", question);
    remove.setAttribute("aria-label", `Remove question ${i + 1}`);
    show(remove, questions.length > 1);
  });
}

/** The questions as `/v1/decisions` has them. */
function askedQuestions(place) {
  return all(".question", place).map((question) => {
    const part = (name) => $(`[data-part=${name}]`, question).value;
    const asked = { type: part("kind"), instructions: part("instructions").trim() };
    const options = lines(part("options")).map((line) => {
      const [, value, description] = /^(.+?)(?::\s+(.*))?$/.exec(line);
      return { value, ...(description ? { description } : {}) };
    });
    if (asked.type === "choice") asked.choices = options;
    if (asked.type === "score") {
      asked.levels = options.map(({ value, ...rest }) => ({ label: value, ...rest }));
    }
    return asked;
  });
}

/** An answer to a question, as elements. */
function answered(question, answer, n) {
  const parts = [make("h3", {}, `${n}. ${question.instructions || question.type}`)];
  const big = (words) => parts.push(make("p", { class: "answer" }, words));
  const confidence = `confidence ${probability(answer.confidence)}`;
  if (answer.type === "predicate") {
    const p = answer.probability;
    big(p >= 0.5 ? "true" : "false");
    parts.push(facts(`${percent(p)} likely to be true`));
    const entries = [{ name: "true", p }, { name: "false", p: 1 - p }];
    parts.push(...bars("Probabilities", entries, { isOrdered: true, head: "Answer" }));
  } else if (answer.type === "choice") {
    big(String(answer.choice));
    parts.push(facts(confidence));
    const entries = answer.probabilities.map(({ value, probability: p }) => ({ name: String(value), p }));
    parts.push(...bars("Probabilities of the choices", entries, { head: "Choice" }));
  } else if (answer.type === "score") {
    const most = answer.probabilities.length - 1;
    big(`${answer.score.toFixed(2)} of ${most}`);
    parts.push(facts("expected level, counted from 0", confidence));
    const entries = answer.probabilities.map(({ label, value, probability: p }) => ({ name: `${value}  ${label}`, p }));
    parts.push(...bars("Probabilities of the levels", entries, { isOrdered: true, head: "Level" }));
  } else {
    big("no answer");
    parts.push(facts(answer.x_reason ?? "the model has declined to answer this question"));
    return parts;
  }
  parts.push(...details(answer));
  return parts;
}

function details(answer) {
  const found = extras(answer);
  return found.length ? [make("details", {}, make("summary", {}, "How this was obtained"), ...found)] : [];
}
