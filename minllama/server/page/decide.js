// The tab that decides: by a trained classifier, by labels, or by questions.

const decide = {
  form: $("#decide-form"),
  result: $("#decide-result"),
  by: () => $("[name=by]:checked").value,
  chosen: {}, // the model of each way to answer
};

/** The request of the form as [path, body]. */
function decideRequest() {
  const by = decide.by();
  const [model, input] = [$("#decide-model").value, $("#text").value];
  if (by === "questions") {
    const questions = askedQuestions($("#questions"));
    return ["/v1/decisions", { model, input, questions }];
  }
  const body = { model, input };
  if (by === "labels") {
    body.labels = lines($("#labels").value);
    if ($("#decide-prompt").value.trim()) body.prompt = $("#decide-prompt").value;
    if ($("#score").value) body.score = $("#score").value;
  }
  if ($("#explain").checked) body.explain = true;
  return ["/classify", body];
}

/** What is missing before the server need be asked. */
function checkDecision(body) {
  const { questions = [], labels } = body;
  if (!body.model) throw new Trouble("There is no model for this; choose another way to answer.");
  if (!body.input.trim()) throw new Trouble("Enter a text first.");
  if (labels && labels.length < 2) throw new Trouble("Enter two labels or more, one on each line.");
  questions.forEach(({ choices, levels, instructions }, i) => {
    if (!instructions) throw new Trouble(`Question ${i + 1} needs words.`);
    const options = choices || levels;
    if (options && options.length < 2) {
      throw new Trouble(`Question ${i + 1} needs two ${choices ? "choices" : "levels"} or more, one on each line.`);
    }
  });
}

async function runDecision(signal) {
  const [path, body] = decideRequest();
  checkDecision(body);
  const begun = performance.now();
  decide.result.setAttribute("aria-busy", "true");
  decide.result.replaceChildren(make("p", { class: "empty" }, "Deciding …"));
  let parts = [make("p", { class: "empty" }, "The answer appears here.")];
  try {
    const answer = await call(path, body, signal);
    const seconds = `${((performance.now() - begun) / 1000).toFixed(2)} s`;
    parts = path === "/classify" ? classified(body, answer, seconds) : decided(body, answer, seconds);
  } catch (error) {
    if (error.name === "AbortError") parts = [make("p", { class: "empty" }, "Stopped.")];
    throw error;
  } finally {
    decide.result.replaceChildren(...parts);
    decide.result.removeAttribute("aria-busy");
    if (parts.length > 1) bringIntoView(decide.result);
  }
}

function decided(body, answer, seconds) {
  const parts = body.questions.flatMap((question, i) => answered(question, answer.answers[i], i + 1));
  const tokens = answer.usage ? `${answer.usage.input_tokens} tokens read` : "";
  return [...parts, make("p", { class: "hint" }, [answer.model, tokens, seconds].filter(Boolean).join(" · "))];
}

function classified(body, answer, seconds) {
  const [entry] = answer.data;
  const labels = answer.x_classes;
  const parts = [];
  const tokens = answer.usage ? `${answer.usage.prompt_tokens} tokens read` : "";
  if (entry.num_classes === 1 && entry.label === null && !entry.x_labels) {
    parts.push(make("p", { class: "answer" }, number(entry.probs[0])), facts("predicted number", tokens, seconds));
  } else {
    parts.push(...classes(entry, labels, [tokens, seconds]));
  }
  const why = entry.x_explanation ?? entry.explanation;
  if (why && why.targets.length) parts.push(...explanation(body.input, why));
  parts.push(...details({ ...answer, ...entry }));
  return parts;
}


function classes(entry, labels, words) {
  const entries = labels.map((name, i) => ({ name, p: entry.probs[i] }));
  const isMulti = Array.isArray(entry.x_labels); // several labels, or none, may be right
  const headline = isMulti ? entry.x_labels.join(", ") || "none of the labels" : entry.label;
  const confidence = isMulti ? "" : `confidence ${probability(confidenceOf(entry.probs))}`;
  const first = isMulti ? "" : percent(Math.max(...entry.probs));
  return [
    make("p", { class: "answer" }, headline),
    facts(first, confidence, ...words),
    ...bars("Probabilities of the labels", entries),
  ];
}

/** Show the fields of the chosen way to answer, and the models that can. */
function renewDecide() {
  const by = decide.by();
  for (const field of all("[data-by]", decide.form)) {
    show(field, field.dataset.by.split(" ").includes(by));
  }
  const fits = {
    classifier: ({ x_kind }) => x_kind === "classifier",
    labels: ({ x_kind }) => x_kind !== "classifier",
    questions: () => true,
  }[by];
  const listed = served.filter(fits);
  listed.sort((a, b) => (a.x_kind === "classifier") - (b.x_kind === "classifier"));
  fill($("#decide-model"), listed.map(({ id }) => [id, id]), decide.chosen[by] ?? "");
  const classes = (served.find(({ id }) => id === $("#decide-model").value) || {}).x_classes || [];
  const named = classes.slice(0, 12).join(", ");
  const rest = classes.length > 12 ? ` and ${classes.length - 12} others` : "";
  $("#decide-model-hint").textContent = named && by === "classifier" ? `Labels: ${named}${rest}` : "";
  const n = { classifier: served.filter((m) => m.x_kind === "classifier").length };
  n.labels = n.questions = served.length - n.classifier;
  const words = {
    classifier: "No trained classifier is served; name its folder: minllama serve runs/NAME",
    labels: "No language model is served; only the trained classifiers answer.",
  };
  $("#by-hint").textContent = served.length && !n[by] ? words[by] ?? "" : "";
  $("#by-classifier").disabled = served.length > 0 && !n.classifier;
  $("#by-labels").disabled = served.length > 0 && !n.labels;
}

function startDecide(onKey) {
  const run = runner(decide.form, { onKey });
  const renewCode = codeView($(".code", decide.form), "decide", decideRequest);
  const renew = () => {
    renewDecide();
    renewCode();
  };
  decide.form.addEventListener("submit", (event) => {
    event.preventDefault();
    run(runDecision);
  });
  decide.form.addEventListener("change", renew);
  decide.form.addEventListener("input", renewCode);
  $("#decide-model").addEventListener("change", () => {
    decide.chosen[decide.by()] = $("#decide-model").value;
  });
  addQuestion($("#questions"), renewCode);
  $("#add-question").addEventListener("click", () => {
    const n = all(".question").length;
    const added = addQuestion($("#questions"), renewCode, KINDS[n % KINDS.length][0]);
    $("select", added).focus();
    renewCode();
  });
  return renew;
}
