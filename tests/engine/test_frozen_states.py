"""States of frozen layers, from which a forward pass goes on as if it had computed them."""

import numpy as np
import pytest
import torch

from minllama.engine import frozen_states
from minllama.engine.frozen_states import FrozenStates, n_frozen_layers, parts_of, states_fit
from minllama.lora import add_lora_wrapper
from minllama.options import TrainingOptions
from minllama.training.trainer import fit
from tests.classifier_cases import embedding
from tests.tiny import our_model, random_ids
from tests.tiny_classifier import LABELS, make_dataset, trained

PROMPTS = [random_ids(1, n)[0].tolist() for n in (5, 2, 9, 5)]


def adapted(layers):
    llama = our_model(n_layers=3)
    torch.manual_seed(0)
    add_lora_wrapper(llama, r=4, layers_to_transform=layers)
    return llama


def test_the_layers_below_the_first_trained_one_are_frozen():
    assert n_frozen_layers(adapted([0, 2])) == 0
    assert n_frozen_layers(adapted([1])) == 1
    assert n_frozen_layers(adapted([2])) == 2
    llama = adapted([2])
    llama.tok_embeddings.weight.requires_grad_()
    assert n_frozen_layers(llama) == 0
    assert n_frozen_layers(our_model(n_layers=3).requires_grad_(False)) == 3


def test_states_are_those_of_a_text_alone(monkeypatch):
    llama = our_model(n_layers=3)
    monkeypatch.setattr(frozen_states, "TOKENS_ON_CPU", 12)  # parts of one or two texts
    states = FrozenStates(llama, PROMPTS, 2)
    n_layers, together = states.start([PROMPTS[2], PROMPTS[1]])
    assert n_layers == 2
    assert together.shape == (2, 9, llama.config.dim)
    after = []
    llama.layers[1].register_forward_hook(lambda layer, given, state: after.append(state))
    for state, prompt in zip(together, (PROMPTS[2], PROMPTS[1]), strict=True):
        llama(torch.tensor([prompt]))
        torch.testing.assert_close(state[: len(prompt)], after[-1][0], atol=1e-5, rtol=1e-5)
        assert not state[len(prompt) :].any()
    assert states.start([PROMPTS[0], [1, 2, 3]]) is None, "not all are known"


def test_parts_have_few_padded_tokens():
    assert parts_of([1, 2, 3, 4], 8) == [(0, 2), (2, 4)]
    assert parts_of([1, 2, 3, 4], 100) == [(0, 4)]
    assert parts_of([5, 6], 4) == [(0, 1), (1, 2)], "longer texts are alone"


def test_few_bytes_are_kept(monkeypatch):
    llama = our_model()
    of_token = llama.config.dim * 4
    monkeypatch.setattr(frozen_states, "MOST_BYTES", 10 * of_token)
    assert states_fit(llama, 10)
    assert not states_fit(llama, 11)
    assert states_fit(llama.to(torch.bfloat16), 20)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_training_from_them_is_training(pooling):
    """Losses and weights of a training on whole passes, while frozen layers run no more."""
    data, runs, weights, losses = make_dataset(), [], [], []
    for keeps in (False, True):
        torch.manual_seed(0)
        classifier = embedding(labels=LABELS, pooling=pooling)
        add_lora_wrapper(classifier, r=4, layers_to_transform=[1])
        prompts = [classifier.encode(text).ids for text in data.texts]
        if keeps:
            classifier.frozen_states = FrozenStates(classifier.llama, prompts, 1)
        runs.clear()
        classifier.llama.layers[0].register_forward_hook(lambda *arguments: runs.append(1))
        options = TrainingOptions(epochs=3, batch_size=4, keep="last", lr=1e-2, autocast="off")
        result = fit(classifier, data, None, options)
        assert bool(runs) != keeps
        losses.append([row["loss"] for row in result.history])
        weights.append(trained(classifier))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert losses[0][-1] < 0.9 * losses[0][0]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=1e-4)
