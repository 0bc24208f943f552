"""The interface of both classifiers: texts in, class probabilities (or numbers) out.

`minllama.classification.zero_shot` and `.embedding` implement it.
"""

import contextlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minllama.atomic import sha256_of
from minllama.classification.prompts import EncodedPrompt, PromptTemplate
from minllama.data.texts import checked_texts
from minllama.data.treebank import undo_treebank
from minllama.distributed.ranks import current
from minllama.engine.choose import KeptEngine
from minllama.engine.evaluation import EvaluationRequest
from minllama.engine.scheduler import Scheduler
from minllama.errors import MinllamaError
from minllama.evaluation.metrics import predictions
from minllama.evaluation.regression import TargetScale
from minllama.evaluation.thresholds import DEFAULT, Thresholds, as_thresholds, positive_class
from minllama.generation.conversation import template_source
from minllama.model.llama import Llama
from minllama.model.mode import evaluating
from minllama.options import PromptOptions
from minllama.tokenizer.tokenizer import Tokenizer

MOST_NOTED = 1_000_000  # texts of which is kept that they were shortened
ENCODED = 8192  # texts at a time: token ids of a million take more memory than a small model


class Evaluator(Protocol):
    """Processes that have parts of a classifier's weights, and compute with them together."""

    def evaluated(
        self,
        classifier: Any,
        prompts: Sequence[Any],
        compute: Callable[[Any, Sequence[Any]], Any],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[list[int], Any]]:
        """Results of this process's N encoded texts, batch by batch; all processes call it at once.

        Args:
            classifier: whose encoded texts they are.
            prompts: N of them.
            compute: from a copy of the classifier with its weights and some texts to their results.
            progress: receives the number of texts just completed.

        Yields:
            The indices of a batch's texts, and what `compute` returns for them.
        """


class Classifier(nn.Module, ABC):
    """Texts -> log-odds and probabilities of C classes.

    Args:
        llama: the model; not copied.
        tokenizer: that of the Llama.
        labels: C different names of classes.
        multi_label: a text may have any number of them: a sigmoid each instead of one softmax.
        template: the frame around a text.
        prompt: the options of the template.

    Attributes:
        temperature: logits are divided by it before they become probabilities (Guo et al. 2017,
            sec. 4.2); 1 until it is fitted.
        decision: the thresholds at which labels are predicted, and the positive class of two; None
            for the most likely class, or each label with at least 0.5.
        shortened: the hash of each text that was too long and has been read in part, up to
            MOST_NOTED of them.
        scale: of the output of a regression; None for classes.
        digest: SHA-256 of the manifest that it was loaded from; None for a new classifier.
        evaluator: computes its predictions while its weights are divided among processes; else
            None.

    Raises:
        MinllamaError: there are no labels, or duplicates.
    """

    def __init__(
        self,
        llama: Llama,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        *,
        multi_label: bool,
        template: PromptTemplate,
        prompt: PromptOptions,
    ) -> None:
        super().__init__()
        self.llama = llama
        self.tokenizer = tokenizer
        self.labels = checked_labels(labels)
        self.multi_label = multi_label
        self.template, self.prompt = template, prompt
        self.temperature = 1.0
        self.decision: Thresholds | None = None
        self.shortened: set[int] = set()
        self.digest: str | None = None
        self.scale: TargetScale | None = None
        self.evaluator: Evaluator | None = llama.shards
        self._engine = KeptEngine()
        self._scheduler: Scheduler | None = None  # while `steady`
        self._lock = threading.RLock()  # an engine is for one thread at a time

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_scheduler": None}  # of this one's tensors
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.RLock()

    @property
    def is_calibrated(self) -> bool:
        """Whether its probabilities were fitted to texts that its weights were not."""
        return self.temperature != 1.0

    @property
    def reads_words(self) -> bool:
        """Whether logits depend on the text itself, too, and not on its token ids alone."""
        return False

    @property
    def reads_output(self) -> bool:
        """Whether logits depend on the Llama's output matrix."""
        return True

    @property
    @abstractmethod
    def n_layers(self) -> int:
        """How many layers of the Llama run."""

    @abstractmethod
    def compute_logits(self, prompts: Sequence[EncodedPrompt]) -> Tensor:
        """Unnormalized scores of encoded texts, differentiable.

        Args:
            prompts: B encoded texts.

        Returns:
            (B, C), float32. Log-softmax over the classes gives log-probabilities, or the sigmoid
            if `multi_label`.
        """

    @abstractmethod
    def request_of(
        self, prompt: EncodedPrompt, *, shared: tuple[int, ...] = ()
    ) -> EvaluationRequest:
        """What a scheduler is to evaluate for an encoded text.

        Args:
            prompt: the text in its prompt.
            shared: what other texts' prompts begin with, and this one perhaps.
        """

    @abstractmethod
    def logits_of(self, prompts: Sequence[EncodedPrompt], results: Sequence[Any]) -> Tensor:
        """`compute_logits` of B encoded texts by the results of their requests: (B, C), float32."""

    def shared_ids(self, n_texts: int) -> tuple[int, ...]:
        """What the prompts of so many texts begin with, where it is worth reading once."""
        return ()

    def encode(self, text: str) -> EncodedPrompt:
        """A text in its prompt, as token ids.

        Raises:
            MinllamaError: the text and its prompt are empty, it cannot be encoded, it is not a
                string, or the tokenizer is for another model.
        """
        checked_texts([text])
        encoded = self.template.encode(undo_treebank(text) if self.prompt.undo_treebank else text)
        if not encoded.ids:
            raise MinllamaError(f"the text {text[:40]!r} has no tokens; omit it, or add a prompt")
        self._check_ids(encoded)
        if encoded.is_shortened and len(self.shortened) < MOST_NOTED:
            self.shortened.add(hash(text))
        return encoded

    def _check_ids(self, encoded: EncodedPrompt) -> None:
        n_tokens = self.llama.config.vocab_size
        largest = max(max(ids, default=0) for ids in (encoded.ids, *encoded.continuations))
        if largest >= n_tokens:
            raise MinllamaError(
                f"the tokenizer produces the id {largest}, but the model has {n_tokens} tokens; "
                "use the model's own tokenizer"
            )

    def predict_logits(
        self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """(N, C) scores of N texts, in their order; without dropout and gradients.

        Several processes that train together divide the texts among them.

        Args:
            texts: N strings.
            progress: receives the number of texts just completed.

        Raises:
            MinllamaError: a text cannot be encoded, has no tokens, or is not a string (a DataError
                with its index); or `texts` is one string.
        """
        texts, ranks = checked_texts(texts), current()
        mine = ranks.part_of_texts(texts)
        progress = ranks.advanced(progress, len(texts))
        logits = np.empty((len(mine), len(self.labels)), dtype=np.float32)
        with self._lock, self.steady() if self.evaluator is None else contextlib.nullcontext():
            # As often in each process, and once without a text: others may wait for this one in it.
            most = -(-len(texts) // ranks.size)
            for start in range(0, max(most, 1), ENCODED):
                encoded = [self.encode(text) for text in mine[start : start + ENCODED]]
                found = self.predict_encoded(encoded, progress=progress)
                logits[start : start + ENCODED] = found
        self.note_shortened(texts)
        return ranks.joined_rows(logits, len(texts))

    def note_shortened(self, texts: Sequence[str]) -> None:
        """Learn which of the texts other processes have shortened."""
        ranks = current()
        if ranks.size > 1:  # by their index: hashes of texts differ between processes
            indices = range(ranks.rank, len(texts), ranks.size)
            found = [i for i in indices if hash(texts[i]) in self.shortened]
            others = ranks.collected(found)
            self.shortened |= {hash(texts[i]) for indices in others for i in indices}

    def predict_encoded(
        self, prompts: Sequence[EncodedPrompt], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """(N, C) scores of N texts that `encode` returned; see `predict_logits`.

        Several threads may call it; their texts are computed one after the other.
        """
        logits = np.empty((len(prompts), len(self.labels)), dtype=np.float32)
        if self.evaluator is not None:
            self._prepare(len(prompts))
            for indices, batch in self.evaluator.evaluated(
                self, prompts, lambda twin, texts: twin.compute_logits(texts), progress=progress
            ):
                logits[indices] = batch.float().cpu().numpy()
            return logits
        with self._lock, self.steady() as scheduler, torch.inference_mode():
            shared = self._prepare(len(prompts))
            requests = [self.request_of(prompt, shared=shared) for prompt in prompts]
            for indices, results in evaluated(scheduler, requests):
                batch = self.logits_of([prompts[i] for i in indices], results)
                logits[indices] = batch.cpu().numpy()
                if progress is not None:
                    progress(len(indices))
        return logits

    def predict_proba(
        self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """(N, C) probabilities, which sum to one per row unless `multi_label`.

        Raises:
            MinllamaError: as `predict_logits`; or it predicts numbers.
        """
        if self.scale is not None:
            raise MinllamaError(
                "this classifier predicts numbers, which have no probabilities; call predict() "
                "or predict_values()"
            )
        logits = self.predict_logits(texts, progress=progress)
        return probabilities(logits, self.temperature, multi_label=self.multi_label)

    def predict_values(
        self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float64]:
        """(N,) numbers, in the unit of the targets.

        Raises:
            MinllamaError: as `predict_logits`; or it predicts classes.
        """
        if self.scale is None:
            raise MinllamaError(
                "this classifier predicts classes, not numbers; call predict() or predict_proba()"
            )
        return self.scale.values(self.predict_logits(texts, progress=progress)[:, 0])

    def predict(
        self, texts: Sequence[str], *, threshold: float | Mapping[str, float] | None = None
    ) -> list[Any]:
        """The class of each text, by the thresholds; a tuple of labels for multi-label.

        Without thresholds, the most likely class, or all labels with at least 0.5. Floats for a
        regression.

        Args:
            texts: N strings.
            threshold: instead of the classifier's own: that of the positive class of two, or of
                every label, or label -> threshold.

        Raises:
            MinllamaError: as `predict_logits`; or such a threshold cannot be.
        """
        decision = self.decision if threshold is None else self._as_decision(threshold)
        if self.scale is not None:
            return [float(value) for value in self.predict_values(texts)]
        chosen = predictions(
            self.predict_proba(texts), multi_label=self.multi_label, thresholds=decision
        )
        rows = [tuple(self.labels[i] for i in np.flatnonzero(row)) for row in chosen]
        return rows if self.multi_label else [name for (name,) in rows]

    @property
    def positive(self) -> str | None:
        """The positive class of two, by default the second; None otherwise."""
        if self.decision is not None and self.decision.positive is not None:
            return self.labels[self.decision.positive]
        number = positive_class(self.labels, None, multi_label=self.multi_label)
        return None if number is None else self.labels[number]

    @property
    def thresholds(self) -> dict[str, float]:
        """Label -> the probability at which it is predicted.

        With two classes the positive one has a threshold; with more classes none has, and the most
        likely is predicted. Can be set to such a mapping or to one number.
        """
        if self.decision is not None:
            return self.decision.by_label(self.labels)
        names = self.labels if self.multi_label else [self.positive] if self.positive else []
        return dict.fromkeys(names, DEFAULT)

    @thresholds.setter
    def thresholds(self, value: float | Mapping[str, float]) -> None:
        self.decide_by(self._as_decision(value))

    @property
    def threshold(self) -> float | None:
        """The common threshold; None if there are several or none.

        May be set.
        """
        values = set(self.thresholds.values())
        return values.pop() if len(values) == 1 else None

    @threshold.setter
    def threshold(self, value: float) -> None:
        self.decide_by(self._as_decision(value))

    def decide_by(self, decision: Thresholds | None) -> None:
        """Predict by these thresholds from now on; probabilities do not change."""
        before, self.decision = (self.positive, self.thresholds), decision
        after = (self.positive, self.thresholds)
        if self.digest is not None and before != after:  # its labels are no longer those
            said = f"{self.digest} {after}".encode("utf-8", "backslashreplace")
            self.digest = sha256_of(said)

    def _as_decision(self, value: float | Mapping[str, float]) -> Thresholds:
        if self.scale is not None:
            raise MinllamaError(
                "this classifier predicts numbers; thresholds need class probabilities"
            )
        positive = None if self.positive is None else self.labels.index(self.positive)
        if positive is None and not self.multi_label:
            raise MinllamaError(
                "thresholds are for two classes or multi-label classifiers, not for "
                f"{len(self.labels)} classes"
            )
        return as_thresholds(value, self.labels, positive)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the classifier to a folder, from which `load_classifier` reads it.

        Raises:
            MinllamaError: it cannot be written; an existing file is unchanged.
        """
        # Storage stands above the classifiers that it writes.
        import_module("minllama.classification.storage.save_load").save_classifier(self, folder)

    @contextlib.contextmanager
    def steady(self) -> Iterator[Scheduler]:
        """While the block runs, weights do not change, so what prompts share is read once.

        These may stand within each other.

        Yields:
            The scheduler that evaluates texts meanwhile.
        """
        with evaluating(self):
            if self._scheduler is not None:
                yield self._scheduler
                return
            self._scheduler = Scheduler(self._engine.of(self.llama))
            try:
                yield self._scheduler
            finally:
                self._scheduler = None

    def _prepare(self, n_texts: int) -> tuple[int, ...]:
        """Called before texts are evaluated; returns what is worth reading once for so many."""
        return ()


def evaluated(
    scheduler: Scheduler, requests: Sequence[EvaluationRequest]
) -> Iterator[tuple[list[int], list[Any]]]:
    """Indices of requests and their results, batch by batch; the scheduler has nothing else to do.

    Those of similar length are computed together, the longest first, so that the memory peak is
    first.
    """
    order = sorted(range(len(requests)), key=lambda i: -requests[i].length)
    index = {scheduler.evaluate(requests[i]): i for i in order}
    try:
        while scheduler.is_busy:
            scheduler.step()
            answered = scheduler.evaluated
            if answered:
                yield [index.pop(e) for e in answered], [e.result for e in answered]
    finally:
        scheduler.cancel(*index)


def probabilities(
    logits: NDArray[np.float32], temperature: float = 1.0, *, multi_label: bool = False
) -> NDArray[np.float32]:
    """softmax(logits / temperature) over (N, C), or the sigmoid if `multi_label`."""
    scaled = torch.from_numpy(logits) / temperature
    result = scaled.sigmoid() if multi_label else scaled.softmax(-1)
    return np.asarray(result.numpy(), dtype=np.float32)


def checked_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Check the labels, and return them as a tuple."""
    if isinstance(labels, str):
        raise MinllamaError(f"labels must be a list of strings, not the string {labels!r}")
    labels = tuple(labels)
    if not labels or not all(isinstance(label, str) and label.strip() for label in labels):
        raise MinllamaError(f"labels must be one or more non-blank names, not {labels!r}")
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise MinllamaError(f"the label {twice!r} is given twice; labels must be distinct")
    return labels


def as_prompt(
    prompt: str | PromptOptions | None, default: str, tokenizer: Tokenizer
) -> PromptOptions:
    """Prompt options, given as such or as a template; `default` for None.

    A named chat template is replaced by its source, since a name's template may change, and the
    tokenizer's digest does not cover it.

    Raises:
        MinllamaError: there is no chat template of that name.
    """
    if isinstance(prompt, str):
        return PromptOptions(prompt=prompt)
    prompt = prompt or PromptOptions()
    if prompt.prompt is None:
        prompt = replace(prompt, prompt=default)
    if prompt.chat_template is not None:
        source = template_source(tokenizer, prompt.chat_template)
        prompt = replace(prompt, chat_template=source)
    return prompt


def make_template(
    prompt: PromptOptions,
    llama: Llama,
    tokenizer: Tokenizer,
    *,
    labels: Sequence[str] = (),
    names: Sequence[str] = (),
    shots: Sequence[tuple[str, str]] = (),
    eos: bool | None = False,
) -> PromptTemplate:
    """The template for the options, limited to the Llama's context."""
    assert prompt.prompt is not None
    context_len = llama.config.context_len
    if prompt.undo_treebank:
        shots = [(undo_treebank(text), label) for text, label in shots]
    return PromptTemplate(
        prompt.prompt,
        tokenizer,
        labels=labels,
        names=names,
        shots=shots,
        chat=prompt.chat,
        system=prompt.system,
        chat_template=prompt.chat_template,
        max_len=min(prompt.max_len or context_len, context_len),
        keep_end=prompt.keep_end,
        eos=eos,
    )
