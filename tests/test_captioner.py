"""Loss, search, sampling and checkpoints, on tiny random models."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import captioner
from captioner import Captioner, CaptionerConfig, Projection, read_metadata
from checkpoints import newest_checkpoint
from cli import UserError
from dataset import collate
from decoder import Decoder, DecoderConfig
from files import content_hash
from generation import GenerationConfig
from objectives import draw
from tokenizer import END_OF_TEXT, BPETokenizer

KINDS = {
    "cross": {},
    "prefix": dict(fusion="prefix"),
    "all of PEFT": dict(fusion="prefix", lora_targets=("q", "mlp"), adapter_dim=4, prefix_length=2, prefix_hidden=8,
                        prompt_length=3),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


class FakeEncoder(torch.nn.Module):
    """Stands for an ImageEncoder whose features a test makes up."""

    runtime = "torch"

    def __init__(self, dim=12, num_tokens=4):
        super().__init__()
        self.name, self.dim, self.num_tokens, self.image_size, self.levels = "fake", dim, num_tokens, 8, 1
        self.weight = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    @property
    def weights_hash(self):
        return content_hash({"weight": self.weight})


def save_decoder(path, vocab_size=50257, seed=0, scale=0.3):
    torch.manual_seed(seed)
    decoder = Decoder(DecoderConfig(vocab_size=vocab_size, n_positions=48, n_embd=64, n_layer=2))
    for name, parameter in decoder.named_parameters():
        if "ln" not in name:
            torch.nn.init.normal_(parameter, std=scale)
    torch.save(decoder.pretrained_state(), path)
    return path


def make_captioner(tmp_path, vocab_size=50257, token_ids=None, trained_scale=0.3, decoder_scale=0.3, **config):
    """A captioner whose trained part is random, so that images matter; with `trained_scale` 0, as training finds it."""
    path = tmp_path / "decoder.bin"
    if not path.exists():
        save_decoder(path, vocab_size, scale=decoder_scale)
    config = CaptionerConfig(**{"projection_layers": 1, "projection_dim": 64, "lora_rank": 2, "lora_targets": ("q", "v")} | config)
    model = Captioner(config, FakeEncoder(), config.load_decoder(path), token_ids).eval()
    torch.manual_seed(1)
    for name, parameter in model.trained_parameters().items():
        if trained_scale and not (config.fusion == "prefix" and "norm" in name):  # image tokens keep the scale of tokens
            torch.nn.init.normal_(parameter, std=trained_scale)
    return model


def log_prob_without_cache(model, features, tokens):
    """log p(tokens | image), computed in one forward pass."""
    inputs = torch.tensor([[model.token_ids[model.end], *tokens[:-1]]])
    with torch.inference_mode():
        logits = model.decoder(inputs, model.projection(features), model.token_ids)
    places = model.column_of[torch.tensor(tokens)]
    return logits[0].log_softmax(-1)[range(len(tokens)), places].sum().item()


# ---- training ----


def test_loss_is_the_mean_over_target_tokens(tmp_path):
    ids = torch.tensor([5, 9, 11, 400, END_OF_TEXT])
    model = make_captioner(tmp_path, token_ids=ids)
    features = torch.randn(2, 4, 12)
    captions = [[5, 9], [11], [400, 5, 9], []]  # the second image has one caption and an empty row
    loss = model.loss(features, *collate(captions)).item()
    by_hand = [log_prob_without_cache(model, features[i // 2:i // 2 + 1], [*caption, END_OF_TEXT])
               for i, caption in enumerate(captions) if caption]
    assert loss == pytest.approx(-sum(by_hand) / (3 + 2 + 4), rel=1e-5)


def test_tokens_that_the_decoder_never_met_are_neither_said_nor_counted(tmp_path):
    state = torch.load(save_decoder(tmp_path / "decoder.bin"))
    state["wte.weight"][9] = 0
    torch.save(state, tmp_path / "decoder.bin")
    model = make_captioner(tmp_path, token_ids=torch.tensor([5, 9, END_OF_TEXT]))
    assert model.token_ids.tolist() == [5, END_OF_TEXT]
    tokens, targets = collate([[5, 9, 5]])
    expected = model.loss(torch.ones(1, 4, 12), tokens, targets.masked_fill(targets == 9, -100))
    torch.testing.assert_close(model.loss(torch.ones(1, 4, 12), tokens, targets), expected)


def test_one_batch_is_overfitted_until_its_captions_come_back(tmp_path, kind):
    captions = ["A dog runs through the snow.", "Two children play on a beach.", "A man rides a horse.",
                "A cup of coffee stands on a wooden table.", "A rocket.", "A cat looks into the camera."]
    tokenizer = BPETokenizer()
    rows = [tokenizer.encode(caption) for caption in captions]
    model = make_captioner(tmp_path, trained_scale=0.05, decoder_scale=0.1, dropout=0.0, projection_dropout=0.0, patch_dropout=0.0,
                           token_ids=torch.tensor(sorted({END_OF_TEXT}.union(*rows))), **kind).train()
    features = torch.randn(len(captions), 4, 12)
    optimizer = torch.optim.Adam(model.trained_parameters().values(), lr=3e-3)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
        loss = model.loss(features, *collate(rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    for beam_size in 1, 3:
        assert model.generate(features, GenerationConfig(beam_size=beam_size)) == captions
    assert model.generate(features.flip(0), GenerationConfig()) == captions[::-1]


def test_more_than_35_million_trained_parameters_are_refused(tmp_path):
    with pytest.raises(UserError, match="35M"):
        make_captioner(tmp_path, projection_dim=1024, projection_layers=3)


def test_linear_projection_mixes_nothing_and_layers_mix_after_a_start_as_identity():
    features = torch.randn(1, 4, 12)
    other = features.clone()
    other[0, 3] += 1
    for layers in 0, 1:
        projection = Projection(CaptionerConfig(projection_layers=layers, projection_dim=64), 12, 4).eval()
        assert torch.equal(projection(features)[0, 0], projection(other)[0, 0])
    torch.nn.init.normal_(projection.layers[0].attn.c_proj.weight)
    assert not torch.allclose(projection(features)[0, 0], projection(other)[0, 0], atol=1e-3)


def test_patch_dropout_leaves_out_other_patches_of_each_image_in_training_alone():
    torch.manual_seed(0)
    config = CaptionerConfig(projection_dim=64, projection_dropout=0, patch_dropout=0.3)
    projection, features = Projection(config, 12, 10), torch.randn(8, 10, 12)
    whole, part = projection.eval()(features), projection.train()(features)
    assert whole.shape == (8, 10, 64) and part.shape == (8, 7, 64)
    kept = [{next(j for j in range(10) if torch.allclose(patch, image[j])) for patch in patches}
            for image, patches in zip(whole, part)]
    assert {len(patches) for patches in kept} == {7} and len({frozenset(patches) for patches in kept}) > 4


@pytest.mark.parametrize("name", ["dropout", "projection_dropout", "patch_dropout", "lora_dropout"])
@pytest.mark.parametrize("value", [-0.1, 1])
def test_impossible_dropout_is_refused(name, value):
    with pytest.raises(UserError, match=f"{name} is {value}"):
        CaptionerConfig(**{name: value})


def self_critical_loss(model, features, reward, temperature=1.0, **options):
    """One step's loss, and the mean reward of the captions drawn."""
    *batch, advantages, rewards = draw(model, features, reward, temperature=temperature, **options)
    return model.loss(features, *batch, temperature=temperature, weights=advantages), rewards.mean().item()


def test_self_critical_loss_draws_without_dropout_and_judges_with_it(tmp_path):
    token_ids = torch.tensor([5, 9, 11, 400, END_OF_TEXT])
    features, drawn, losses = torch.randn(2, 4, 12), [], []
    for training in False, True:
        model = make_captioner(tmp_path, token_ids=token_ids, decoder_scale=0.1, dropout=0.5).train(training)

        def reward(captions, ended):
            drawn.append(captions)
            return [float(i) for i in range(len(captions))]

        losses.append(self_critical_loss(model, features, reward, samples=3, seed=3, max_length=3)[0].item())
        assert model.training == training
    assert drawn[0] == drawn[1] and losses[0] != pytest.approx(losses[1])


def test_self_critical_loss_is_reinforce_with_the_other_samples_as_baseline(tmp_path):
    model = make_captioner(tmp_path, token_ids=torch.tensor([5, 9, 11, 400, END_OF_TEXT]), decoder_scale=0.1)
    torch.manual_seed(1)
    features, drawn, whole = torch.randn(2, 4, 12), [], []

    def reward(captions, ended):
        drawn.extend(captions)
        whole.extend(ended)
        return [float(i**2) for i in range(len(captions))]  # 0 1 4, 9 16 25

    loss, mean = self_critical_loss(model, features, reward, samples=3, seed=3, max_length=3)
    assert mean == pytest.approx(55 / 6)
    rows = model.sample(model.projection(features), GenerationConfig(sample=True, max_length=3, seed=3), range(6))
    assert drawn == [model.text(row) for row in rows]
    assert whole == [len(row) < 3 for row in rows] and {*whole} == {True, False}
    log_probs = [log_prob_without_cache(model, features[i // 3:i // 3 + 1], row + [END_OF_TEXT] * (len(row) < 3))
                 for i, row in enumerate(rows)]
    advantages = [0 - 2.5, 1 - 2, 4 - 0.5, 9 - 20.5, 16 - 17, 25 - 12.5]
    tokens = sum(len(row) + (len(row) < 3) for row in rows)
    by_hand = -sum(advantage * log_prob for advantage, log_prob in zip(advantages, log_probs)) / tokens
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)


def test_self_critical_loss_under_autocast_reaches_all_that_is_trained(tmp_path):
    model = make_captioner(tmp_path, token_ids=torch.tensor([5, 9, 11, 400, END_OF_TEXT]), decoder_scale=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = self_critical_loss(model, torch.randn(2, 4, 12), lambda captions, ended: range(6), samples=3, max_length=3)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.trained_parameters().values())


def test_self_critical_training_raises_the_reward(tmp_path):
    model = make_captioner(tmp_path, token_ids=torch.tensor([5, 9, 11, 400, END_OF_TEXT]), trained_scale=0.05)
    features = torch.randn(4, 4, 12)
    wanted = model.text([11] * 5)

    def reward(captions, ended):
        return [float(caption == wanted) for caption in captions]

    optimizer = torch.optim.Adam(model.trained_parameters().values(), lr=1e-2)
    means = []
    for step in range(60):
        loss, mean = self_critical_loss(model, features, reward, samples=20, seed=step, max_length=6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        means.append(mean)
    assert sum(means[-5:]) > 4 and sum(means[:5]) < 1, means


# ---- search ----


def exhaustive_search(model, features, max_length, alphas):
    """For each alpha, the best of all sequences that end with <|endoftext|> or at max_length; one image."""
    end = int(model.token_ids[model.end])
    others = [token for token in model.token_ids.tolist() if token != end]
    rows = [[*words, end] for n in range(max_length) for words in itertools.product(others, repeat=n)]
    rows += [list(words) for words in itertools.product(others, repeat=max_length)]
    tokens = torch.tensor([row + [end] * (max_length - len(row)) for row in rows])
    inputs = torch.cat([torch.full((len(rows), 1), end), tokens[:, :-1]], 1)
    with torch.inference_mode():
        steps = model.decoder(inputs, model.projection(features)).log_softmax(-1).gather(2, tokens[:, :, None])
    scores = [steps[i, :len(row)].sum().item() for i, row in enumerate(rows)]
    best = [max(range(len(rows)), key=lambda i: scores[i] / len(rows[i]) ** alpha) for alpha in alphas]
    return [[token for token in rows[i] if token != end] for i in best]


def test_beam_search_equals_exhaustive_search_on_a_tiny_vocabulary(tmp_path):
    model = make_captioner(tmp_path, vocab_size=4)
    features, alphas = torch.randn(5, 4, 12), (0.0, 0.7, 1.5)
    with torch.inference_mode():
        image = model.projection(features)
        found = [model.beam_search(image, GenerationConfig(4**4, alpha, max_length=4)) for alpha in alphas]
    expected = [exhaustive_search(model, features[i:i + 1], 4, alphas) for i in range(5)]
    assert [list(rows) for rows in zip(*found)] == expected
    assert len({tuple(row) for rows in expected for row in rows}) > 1


def plain_beam_search(model, features, K, alpha, max_length):
    """The same rules as Captioner.beam_search, one image, no cache, Python lists: a second implementation."""
    end = int(model.token_ids[model.end])
    running, finished = [(0.0, [])], []
    for length in range(1, max_length + 1):
        candidates = []
        for score, words in running:
            with torch.inference_mode():
                logits = model.decoder(torch.tensor([[end, *words]]), model.projection(features), model.token_ids)
            steps = logits[0, -1].log_softmax(-1).tolist()
            candidates += [(score + step, [*words, token]) for step, token in zip(steps, model.token_ids.tolist())]
        candidates = sorted(candidates, key=lambda pair: -pair[0])[:2 * K]
        finished += [(score / length**alpha, words[:-1]) for score, words in candidates[:K] if words[-1] == end]
        running = [(score, words) for score, words in candidates if words[-1] != end][:K]
        if len(finished) >= K:
            break
    else:
        finished += [(score / max_length**alpha, words) for score, words in running]
    return max(finished, key=lambda pair: pair[0])[1]


@pytest.mark.parametrize("K, alpha", [(1, 0.0), (3, 0.0), (4, 1.0)])
def test_beam_search_with_cache_and_batch_equals_plain_beam_search(tmp_path, K, alpha, kind):
    model = make_captioner(tmp_path, vocab_size=6, decoder_scale=0.2, trained_scale=0.1 if kind else 0.3, **kind)
    features = 3 * torch.randn(12, 4, 12)
    with torch.inference_mode():
        found = model.beam_search(model.projection(features), GenerationConfig(K, alpha, max_length=12))
    assert found == [plain_beam_search(model, features[i:i + 1], K, alpha, 12) for i in range(12)]
    assert len({len(row) for row in found}) > 1  # images leave the batch at different times


@pytest.mark.parametrize("generation", [GenerationConfig(1, max_length=12), GenerationConfig(3, max_length=12),
                                        GenerationConfig(sample=True, seed=3, max_length=12)])
def test_captions_do_not_depend_on_the_batch(tmp_path, generation, kind):
    model = make_captioner(tmp_path, token_ids=torch.arange(0, END_OF_TEXT + 1, 48), trained_scale=0.1 if kind else 1.0, **kind)
    features = torch.randn(18, 4, 12)

    def in_batches(size):
        return [text for start in range(0, 18, size)
                for text in model.generate(features[start:start + size], generation, range(start, min(start + size, 18)))]

    assert in_batches(1) == in_batches(7) == in_batches(18)
    assert len(set(in_batches(18))) > 9


def test_only_the_named_tokens_are_said(tmp_path):
    ids = torch.tensor([64, 5, 900, 4000, END_OF_TEXT]).sort().values
    model = make_captioner(tmp_path, token_ids=ids)
    with torch.inference_mode():
        image = model.projection(torch.randn(8, 4, 12))
        rows = model.beam_search(image, GenerationConfig()) + model.sample(image, GenerationConfig())
    said = {token for row in rows for token in row}
    assert said and said <= set(ids.tolist()) - {END_OF_TEXT}


def sampled_frequencies(model, generation, draws=4000):
    """How often each token comes first, over many samples for one image."""
    with torch.inference_mode():
        image = model.projection(torch.ones(1, 4, 12)).expand(draws, -1, -1)
        rows = model.sample(image, generation, range(draws))
    counts = torch.zeros(len(model.token_ids))
    for row in rows:
        counts[int(model.column_of[row[0]]) if row else model.end] += 1
    return counts / draws


def test_sampling_follows_the_distribution_and_its_cuts(tmp_path):
    model = make_captioner(tmp_path, vocab_size=8)
    with torch.inference_mode():
        logits = model.decoder(torch.tensor([[7]]), model.projection(torch.ones(1, 4, 12)), model.token_ids)[0, 0]
    order = logits.argsort(descending=True)
    for generation, keep in [
        (GenerationConfig(sample=True, max_length=1), 8),
        (GenerationConfig(sample=True, max_length=1, temperature=0.5), 8),
        (GenerationConfig(sample=True, max_length=1, top_k=3), 3),
        (GenerationConfig(sample=True, max_length=1, top_p=0.6), None),
        (GenerationConfig(sample=True, max_length=1, top_p=0.6, top_k=1), 1),
    ]:
        probs = (logits / generation.temperature).softmax(-1)
        if keep is None:  # the smallest set whose mass reaches top_p
            keep = int((probs[order].cumsum(0) < generation.top_p).sum()) + 1
            assert 1 < keep < 8, probs
        expected = torch.zeros(8).index_fill(0, order[:keep], 1) * probs
        expected /= expected.sum()
        found = sampled_frequencies(model, generation)
        assert (found - expected).abs().max() < 4 * math.sqrt(0.25 / 4000)
        assert not found[order[keep:]].any()


def test_several_samples_of_an_image_are_those_of_its_copies(tmp_path):
    model = make_captioner(tmp_path)
    features, generation = torch.randn(3, 4, 12), GenerationConfig(sample=True, max_length=8)
    assert model.generate(features, generation, range(6)) == model.generate(features.repeat_interleave(2, 0), generation)


def test_samples_are_the_same_for_a_seed_and_differ_between_seeds(tmp_path):
    model = make_captioner(tmp_path)
    features = torch.randn(6, 4, 12)
    one, again, other = (model.generate(features, GenerationConfig(sample=True, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize("options", [dict(beam_size=0), dict(max_length=0), dict(temperature=0), dict(top_p=0), dict(seed=-1)])
def test_impossible_generation_options_are_refused(options):
    with pytest.raises(UserError):
        GenerationConfig(**options)


# ---- checkpoints ----


def test_a_checkpoint_brings_back_the_model_and_holds_only_what_was_trained(tmp_path, kind):
    model = make_captioner(tmp_path, token_ids=torch.tensor([5, 9, 11, 400, END_OF_TEXT]), **kind)
    model.save(tmp_path / "c.safetensors", {"epochs": 2}, {"cider": 0.5})
    again = Captioner.load(tmp_path / "c.safetensors", tmp_path / "decoder.bin", model.encoder)
    features = torch.randn(6, 4, 12)
    assert again.generate(features) == model.generate(features)
    assert again.token_ids.tolist() == model.token_ids.tolist() and again.config == replace(model.config, prefix_hidden=0)
    assert again.metadata["training"] == {"epochs": 2} and again.metadata["scores"] == {"cider": 0.5}
    size = (tmp_path / "c.safetensors").stat().st_size
    assert size < 2 * model.num_trained() + 20_000  # fp16, and nothing of the frozen weights
    everything = Captioner.load(tmp_path / "c.safetensors", tmp_path / "decoder.bin", model.encoder, all_tokens=True)
    assert len(everything.token_ids) == 50257


def test_a_checkpoint_that_knows_of_no_levels_has_one(tmp_path, monkeypatch):
    """As those written before there were several; a later one brings back its number."""
    model = make_captioner(tmp_path)
    asked = []
    monkeypatch.setattr(captioner, "load_encoder", lambda name, size, levels, *others, **options: asked.append(levels) or model.encoder)
    file = tmp_path / "c.safetensors"
    model.config.encoder_levels = 2
    model.save(file)
    Captioner.load(file, tmp_path / "decoder.bin")
    metadata = read_metadata(file)
    del metadata["model"]["encoder_levels"]
    save_file(load_file(file), file, {"captioner": json.dumps(metadata)})
    Captioner.load(file, tmp_path / "decoder.bin")
    assert asked == [2, 1]


def test_a_checkpoint_meets_only_the_weights_it_was_trained_with(tmp_path):
    model = make_captioner(tmp_path)
    model.save(tmp_path / "c.safetensors")
    save_decoder(tmp_path / "other.bin", seed=1)
    with pytest.raises(UserError, match="other decoder weights"):
        Captioner.load(tmp_path / "c.safetensors", tmp_path / "other.bin", model.encoder)
    encoder = FakeEncoder()
    encoder.weight.data += 1
    with pytest.raises(UserError, match="other encoder weights"):
        Captioner.load(tmp_path / "c.safetensors", tmp_path / "decoder.bin", encoder)


def test_newest_matching_checkpoint_is_found(tmp_path):
    import os

    model = make_captioner(tmp_path)
    for age, name in enumerate(["new", "old", "older"]):
        model.save(tmp_path / f"{name}.safetensors")
        os.utime(tmp_path / f"{name}.safetensors", (10**9 - age, 10**9 - age))
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    assert newest_checkpoint(model.decoder.weights_hash, [tmp_path]) == tmp_path / "new.safetensors"
    assert newest_checkpoint("another", [tmp_path]) is None
    with pytest.raises(UserError, match="damaged"):
        read_metadata(tmp_path / "broken.safetensors")
