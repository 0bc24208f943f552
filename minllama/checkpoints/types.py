"""The types that every checkpoint format is read into.

A `Checkpoint` has the config, the vocabulary and the shape and position of each tensor; data is
read tensor by tensor when a model requests it.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from minllama.checkpoints.huggingface_head import SEQUENCE_CLASSIFIER, SequenceHead
from minllama.errors import CheckpointError
from minllama.model.config import LlamaConfig
from minllama.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from minllama.quantization.gguf_blocks import GGMLType


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still on disk.

    Attributes:
        shape: its shape once loaded.
        stored_as: the type it is stored as, for people: `bfloat16`, `Q4_1`.
        stored_bytes: the bytes that it takes on disk.
        load: reads it, on the CPU, memory-mapped where the format allows: the tensor may be
            read-only, and the caller must not write to it.
        blocks: its ggml type and its bytes (n_bytes,) as stored in the file, for types that are
            blocks; None for numbers.
        load_rows: reads rows [start, stop) of it and, but for a head's, no others; None where the
            format has it only whole.
    """

    shape: tuple[int, ...]
    stored_as: str
    stored_bytes: int
    load: Callable[[], Tensor]
    blocks: "Callable[[], tuple[GGMLType, Tensor]] | None" = None
    load_rows: Callable[[int, int], Tensor] | None = None

    def row_reader(self) -> Callable[[int, int], Tensor]:
        """A function that reads rows [start, stop).

        Without `load_rows` the tensor is loaded here, once, and is freed with the function.
        """
        if self.load_rows is not None:
            return self.load_rows
        whole = self.load()
        return lambda start, stop: whole[start:stop]


class TensorSource(Mapping[str, Tensor]):
    """Tensors by their names, each of which is made when it is read, and not kept."""

    @property
    @abstractmethod
    def like(self) -> Mapping[str, Tensor]:
        """Tensors of the same names, shapes and dtypes on the meta device."""

    def __len__(self) -> int:
        return len(self.like)

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)


def without_values(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Names, shapes and dtypes of tensors, on the meta device; none of them is read."""
    if isinstance(tensors, TensorSource):
        return tensors.like
    return {name: tensor.detach().to("meta") for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Checkpoint:
    """One Llama on disk: its config, its tensors in minllama's naming, and its vocabulary.

    Attributes:
        path: the file or folder that was opened.
        format: its format, for display: `Hugging Face`, `GGUF`.
        config: of the model.
        tensors: minllama's name (`layers.0.attention.compute_query.weight`) -> position of its
            data. q and k are laid out for interleaved rotation, as in the model.
        read_vocabulary: reads its tokenizer; see `vocabulary`.
        ignored: keys and tensors of the file that were not read, for display.
        source: its name for reopening it: `default`, a Hugging Face id, or the absolute path.
        tokenizer: likewise for a separate tokenizer; None for its own.
        ends_at_bos: the model was trained on concatenated texts, each of which ends where the next
            begins, without EOS.
        head: the classification head that replaces a language model's head, whose tensors are among
            `tensors` by their own names; None for a language model.
        base_path: of an adapter, the file or folder of its base; None for a complete model.
    """

    path: Path
    format: str
    config: LlamaConfig
    tensors: dict[str, LazyTensor] = field(repr=False)
    read_vocabulary: Callable[[], Vocabulary | None] = field(repr=False)
    ignored: tuple[str, ...] = ()
    source: str = ""
    tokenizer: str | None = None
    ends_at_bos: bool = False
    head: SequenceHead | None = None
    base_path: Path | None = None

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """Its tokenizer, read on first access; None if there is none in it or in its folder.

        Raises:
            TokenizerError: it is damaged, or of a kind that is not known.
        """
        vocabulary = self.read_vocabulary()
        if not self.ends_at_bos or vocabulary is None or vocabulary.bos_id is None:
            return vocabulary
        stop_ids = tuple(dict.fromkeys((*vocabulary.stop_ids, vocabulary.bos_id)))
        return dataclasses.replace(vocabulary, stop_ids=stop_ids)

    def check_language_model(self) -> None:
        """Refuse a checkpoint with a head other than a language model's.

        Raises:
            CheckpointError: says what it is, and what opens it.
        """
        if self.head is not None:
            raise CheckpointError(
                f"{self.path}: a sequence classifier ({SEQUENCE_CLASSIFIER}), whose head "
                "predicts labels instead of tokens; open it with `minllama classify`, `minllama "
                "evaluate` or load_classifier()"
            )

    def without_head(self) -> "Checkpoint":
        """The Llama below a sequence classifier's head; a language model's stays unchanged.

        Without an output matrix in the file, the embeddings serve as one: a Llama needs one,
        even though no logits are computed here.
        """
        if self.head is None:
            return self
        tensors = {n: tensor for n, tensor in self.tensors.items() if not n.startswith("score.")}
        config = self.config
        if "output.weight" not in tensors:
            config = config.replace(tie_embeddings=True)
        return dataclasses.replace(self, config=config, tensors=tensors, head=None)


def lazy(tensor: Tensor) -> LazyTensor:
    """A LazyTensor for a tensor that is already loaded or memory-mapped."""
    stored = str(tensor.dtype).removeprefix("torch.")
    return LazyTensor(
        tuple(tensor.shape),
        stored,
        tensor.nbytes,
        lambda: tensor,
        load_rows=lambda start, stop: tensor[start:stop],
    )
