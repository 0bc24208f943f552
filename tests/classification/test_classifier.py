"""Both classifiers: scores, heads, batches, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from minllama.classification import LlamaEmbeddingClassifier
from minllama.engine.packing import layer_states
from minllama.errors import MinllamaError, OptionError
from minllama.model.llama import load_pretrained
from minllama.options import POOLINGS, SCORES, PromptOptions
from tests.classifier_cases import ALPHABET, TEXTS, Characters, embedding, tiny_llama, zero_shot
from tests.tiny import SHAPE, random_ids


def completion(classifier, text, word):
    """Log p(word | prompt), token by token, without padding, cache or trie."""
    prompt = classifier.template.encode(text)
    place = classifier.label_words.index(word)
    total = 0.0
    ids = list(prompt.ids)
    for token in prompt.continuations[place]:
        with torch.no_grad():
            logits = classifier.llama(torch.tensor([ids]), logits="last").logits[0]
        total += float(F.log_softmax(logits, -1)[token])
        ids.append(token)
    return total


def sums(classifier, text):
    return [completion(classifier, text, word) for word in classifier.label_words]


def test_zero_shot_logits_are_sums_over_all_tokens_of_a_label():
    classifier = zero_shot()
    expected = [sums(classifier, text) for text in TEXTS]
    np.testing.assert_allclose(classifier.predict_logits(TEXTS), expected, atol=1e-4)


def test_means_divide_by_tokens_and_by_bytes():
    labels = ("good", "bad", "a bore")
    raw = zero_shot(labels=labels).predict_logits(TEXTS)
    by_token = zero_shot(labels=labels, score="token-mean").predict_logits(TEXTS)
    by_byte = zero_shot(labels=labels, score="byte-mean").predict_logits(TEXTS)
    np.testing.assert_allclose(by_token, raw / [5, 4, 7], atol=1e-5)  # with the space before it
    np.testing.assert_allclose(by_byte, raw / [4, 3, 6], atol=1e-5)


def test_pmi_takes_off_the_score_without_a_text():
    classifier = zero_shot(score="pmi")
    expected = np.array([sums(classifier, text) for text in TEXTS]) - sums(classifier, "")
    np.testing.assert_allclose(classifier.predict_logits(TEXTS), expected, atol=1e-4)


def test_contextual_calibration_divides_by_what_texts_without_content_give():
    classifier = zero_shot(score="contextual")
    free = torch.tensor([sums(classifier, text) for text in ("N/A", "[MASK]", "")]).softmax(-1)
    p = torch.tensor([sums(classifier, text) for text in TEXTS]).softmax(-1)
    q = p / free.mean(0)  # Zhao et al.: W = diag(p_cf)^-1, then normalized
    expected = q / q.sum(-1, keepdim=True)
    np.testing.assert_allclose(classifier.predict_proba(TEXTS), expected, atol=1e-5)


def test_batch_calibration_evens_out_what_it_has_seen():
    classifier = zero_shot(score="batch")
    with pytest.raises(MinllamaError, match="fit_prior"):
        classifier.predict(TEXTS)
    classifier.fit_prior(TEXTS)
    p = torch.tensor([sums(classifier, text) for text in TEXTS]).softmax(-1)
    q = p / p.mean(0)
    np.testing.assert_allclose(
        classifier.predict_proba(TEXTS), q / q.sum(-1, keepdim=True), atol=1e-5
    )


def test_a_label_that_is_very_unlikely_everywhere_has_a_prior_too():
    words = ("a", "a fine film, no" * 6)
    classifier = zero_shot(labels=("usual", "never"), label_words=words, score="batch")
    gap = np.subtract(*sums(classifier, TEXTS[0]))
    assert gap > 110  # e^-104 is the smallest number of float32
    classifier.fit_prior(TEXTS)
    p = torch.tensor([sums(classifier, text) for text in TEXTS]).double().softmax(-1)
    q = p / p.mean(0)
    np.testing.assert_allclose(
        classifier.predict_proba(TEXTS), q / q.sum(-1, keepdim=True), atol=1e-3
    )


def test_a_correction_can_be_made_in_part():
    whole, half, none = (
        zero_shot(score="pmi", prior_strength=strength).predict_logits(TEXTS)
        for strength in (1.0, 0.5, 0.0)
    )
    np.testing.assert_allclose(half, (whole + none) / 2, atol=1e-5)
    np.testing.assert_allclose(none, zero_shot().predict_logits(TEXTS), atol=1e-5)
    assert not np.allclose(whole, none, atol=0.1)


@pytest.fixture(params=["one batch", "several"])
def in_batches(request, monkeypatch):
    """All texts fit into one batch, or only a few of them, which are not neighbors in the list."""
    limit = {"one batch": 1024, "several": 90}[request.param]
    monkeypatch.setattr("minllama.engine.evaluations.BATCH_TOKENS", {"cpu": limit})


@pytest.mark.parametrize("score", SCORES)
def test_zero_shot_numbers_do_not_depend_on_the_batch(score, in_batches):
    classifier = zero_shot(score=score, prompt="Which of {labels}? A long preamble.\n{text}\nis")
    classifier.fit_prior(TEXTS)
    together = classifier.predict_proba(TEXTS)
    alone = np.concatenate([classifier.predict_proba([text]) for text in TEXTS])
    assert together.dtype == np.float32
    assert together.shape == (6, 3)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together.sum(1), 1, atol=1e-5)
    assert classifier.predict(TEXTS) == [classifier.labels[i] for i in together.argmax(1)]


def test_label_words_stand_for_labels_and_shots_come_first():
    classifier = zero_shot(
        labels=("0", "1"), label_words=("bad", "good"), shots=[("so so", "bad"), ("yes", "good")]
    )
    ids = classifier.encode("no").ids
    shown = "".join(ALPHABET[i] for i in ids)
    assert shown == "Text: so so\nis bad\n\nText: yes\nis good\n\nText: no\nis"
    assert set(classifier.predict(TEXTS)) <= {"0", "1"}


def test_what_cannot_be_a_zero_shot_classifier_is_said():
    with pytest.raises(MinllamaError, match="label words"):
        zero_shot(label_words=("good", "bad"))
    with pytest.raises(MinllamaError, match="twice"):
        zero_shot(labels=("a", "a"))
    with pytest.raises(MinllamaError, match="score must be"):
        zero_shot(score="best")
    with pytest.raises(MinllamaError, match="not the string"):
        zero_shot(labels="good,bad")
    with pytest.raises(MinllamaError, match="causal"):
        zero_shot(llama=tiny_llama(causal=False))
    with pytest.raises(MinllamaError, match="exactly once"):
        zero_shot(prompt="no place for it")


@pytest.mark.parametrize("side", ["left", "right", "none"])
@torch.no_grad()
def test_head_logits_equal_transformers(tmp_path, side):
    torch.manual_seed(5)
    config = TheirConfig(**SHAPE, num_labels=4, pad_token_id=0)
    theirs = LlamaForSequenceClassification(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.15)
    whole = LlamaForCausalLM(config)
    whole.model = theirs.model
    whole.save_pretrained(tmp_path)
    ours = LlamaEmbeddingClassifier(
        load_pretrained(tmp_path, device="cpu"), Characters(), ["a", "b", "c", "d"]
    ).eval()
    ours.score.weight.copy_(theirs.score.weight)
    ids = random_ids(3, 9, vocab_size=97) % 96 + 1  # transformers finds the end by the pad id
    mask = torch.ones_like(ids)
    if side != "none":
        for row, n in enumerate((0, 2, 5)):
            columns = slice(0, n) if side == "left" else slice(9 - n, 9)
            mask[row, columns] = 0
            ids[row, columns] = 0
    expected = theirs(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    torch.testing.assert_close(
        ours(ids, mask), F.log_softmax(expected.logits, -1), atol=1e-5, rtol=1e-4
    )


def test_the_end_is_found_by_the_mask_and_not_by_an_id():
    classifier = embedding().eval()
    ids = torch.tensor([[3, 4, 0, 0], [3, 4, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    log_probs = classifier(ids, mask)
    torch.testing.assert_close(log_probs[1:], classifier(ids[:1, :2]))
    assert not torch.allclose(log_probs[0], log_probs[1])


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("layer", [1, 2])
def test_vectors_are_pooled_over_real_tokens_of_the_layer(pooling, layer):
    classifier = embedding(pooling=pooling, layer=layer).eval()
    ids = random_ids(1, 7)
    states = list(layer_states(classifier.llama, ids))
    h = states[layer]
    if layer == 2:
        h = classifier.llama.norm(h)
    else:
        h = h / h.pow(2).mean(-1, keepdim=True).add(1e-5).sqrt()
    weights = {"last": [0] * 6 + [1], "mean": [1] * 7, "weighted-mean": range(1, 8)}[pooling]
    w = torch.tensor(list(weights), dtype=torch.float32)
    expected = (w / w.sum()) @ h[0]
    torch.testing.assert_close(classifier.compute_embeddings(ids)[0], expected)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    torch.testing.assert_close(
        classifier.compute_embeddings(padded, mask)[0], expected, atol=1e-5, rtol=1e-4
    )


def test_layers_above_the_chosen_one_never_run():
    classifier = embedding(layer=1)
    for parameter in classifier.llama.layers[1].parameters():
        parameter.data.fill_(math.nan)
    assert np.isfinite(classifier.predict_proba(TEXTS)).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("multi_label", [True, False])
def test_head_numbers_do_not_depend_on_the_batch(causal, multi_label, in_batches):
    classifier = embedding(
        llama=tiny_llama(causal=causal), multi_label=multi_label, pooling="mean", bias=True
    )
    classifier.score.weight.data *= 50
    together = classifier.predict_proba(TEXTS)
    alone = np.concatenate([classifier.predict_proba([text]) for text in TEXTS])
    assert np.abs(np.diff(together, axis=0)).max(1).min() > 1e-3  # rows are told apart
    np.testing.assert_allclose(together, alone, atol=1e-5)
    if multi_label:
        assert classifier.predict(TEXTS)[0] == tuple(
            name for name, p in zip(classifier.labels, together[0], strict=True) if p >= 0.5
        )
        logits = classifier.predict_logits(TEXTS)
        np.testing.assert_allclose(together, 1 / (1 + np.exp(-logits)), atol=1e-6)
    else:
        assert classifier.predict(TEXTS) == [classifier.labels[i] for i in together.argmax(1)]


def test_bidirectional_attention_looks_ahead():
    ids = random_ids(2, 6)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 61
    for causal in (True, False):
        llama = tiny_llama(causal=causal)
        first = [list(layer_states(llama, x))[-1][:, 0] for x in (ids, changed)]
        assert torch.equal(*first) == causal


def test_dropout_is_for_training_only():
    classifier = embedding(dropout=0.5)
    classifier.train()
    ids = random_ids(2, 6)
    assert not torch.equal(classifier(ids), classifier(ids))
    one, other = classifier.predict_proba(TEXTS), classifier.predict_proba(TEXTS)
    np.testing.assert_array_equal(one, other)
    assert classifier.training
    assert classifier.dropout.training


def test_a_temperature_flattens_and_keeps_the_order():
    classifier = embedding()
    classifier.score.weight.data *= 50
    sharp = classifier.predict_proba(TEXTS)
    classifier.temperature = 4.0
    flat = classifier.predict_proba(TEXTS)
    np.testing.assert_array_equal(sharp.argmax(1), flat.argmax(1))
    assert (flat.max(1) < sharp.max(1)).all()


def test_long_texts_are_cut_where_the_prompt_says():
    options = PromptOptions(prompt="A {text} B", max_len=12)
    classifier = embedding(prompt=options)
    assert "".join(ALPHABET[i] for i in classifier.encode("0123456789abcdef").ids) == "A 01234567 B"
    end = embedding(prompt=PromptOptions(prompt="A {text} B", max_len=12, keep_end=True))
    assert "".join(ALPHABET[i] for i in end.encode("0123456789abcdef").ids) == "A 89abcdef B"


def test_treebank_spacing_is_undone_where_it_is_asked_for():
    options = PromptOptions(prompt="{text}", undo_treebank=True)
    ids = embedding(prompt=options).encode("it 's n't bad , no ?").ids
    assert "".join(ALPHABET[i] for i in ids) == "it'sn't bad, no?"


def test_what_cannot_be_a_head_is_said():
    with pytest.raises(MinllamaError, match="layer must be 1 to 2"):
        embedding(layer=3)
    with pytest.raises(MinllamaError, match="pooling must be"):
        embedding(pooling="max")
    with pytest.raises(MinllamaError, match="id2label"):
        embedding(labels={0: "a", 2: "b"})
    with pytest.raises(OptionError, match="max_len"):
        PromptOptions(max_len=1)
    with pytest.raises(MinllamaError, match="no tokens"):
        embedding().predict(["fine", ""])
    with pytest.raises(MinllamaError, match="a sequence without tokens"):
        embedding()(random_ids(1, 3), torch.zeros(1, 3))


def test_names_by_number_come_in_order():
    assert embedding(labels={1: "b", 0: "a"}).labels == ("a", "b")
    assert embedding(labels=["x", "y"]).id2label == {0: "x", 1: "y"}


def test_one_string_is_not_taken_for_a_list_of_letters():
    with pytest.raises(MinllamaError, match="texts must be a list of strings, not the string 'a"):
        embedding().predict("a text")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_classifier_can_be_cast_as_a_whole(dtype):
    classifier = embedding()
    before = classifier.predict_proba(TEXTS)
    classifier.to(dtype)
    ids = random_ids(2, 5)
    assert classifier(ids % 20).dtype == torch.float32
    np.testing.assert_allclose(classifier.predict_proba(TEXTS), before, atol=0.03)
