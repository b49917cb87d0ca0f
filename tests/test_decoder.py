"""The decoder is GPT-2: it equals Hugging Face's, and so it does with untrained additions."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from cli import UserError
from decoder import BeamCache, Cache, Decoder, attention_weights
from files import content_hash


def hugging_face_gpt2(width, layers, vocab_size=300):
    torch.manual_seed(width)
    model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, n_positions=48,
                                       vocab_size=vocab_size, bos_token_id=0, eos_token_id=0)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)  # far from the initial weights, where every layer matters
    return model


def save(model, path):
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def random_decoder(tmp_path, **options):
    """A frozen decoder whose additions are random instead of the no-op they start as."""
    decoder = Decoder.from_pretrained(save(hugging_face_gpt2(128, 2), tmp_path / "gpt2.bin"), **options).eval()
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return decoder


@pytest.mark.parametrize("width, layers", [(128, 2), (320, 3)])
@pytest.mark.parametrize("name", ["gpt2.bin", "gpt2.safetensors"])
def test_logits_equal_hugging_face(tmp_path, width, layers, name):
    theirs = hugging_face_gpt2(width, layers)
    ours = Decoder.from_pretrained(save(theirs, tmp_path / name)).eval()
    tokens = torch.randint(0, 300, (4, 40))
    with torch.inference_mode():
        expected = theirs(tokens).logits
        assert expected.std() > 0.3
        torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=0)
        some = torch.tensor([3, 77, 299])
        torch.testing.assert_close(ours(tokens, token_ids=some), expected[..., some], atol=1e-4, rtol=0)


def test_saved_state_loads_in_hugging_face(tmp_path):
    theirs = hugging_face_gpt2(128, 2)
    ours = Decoder.from_pretrained(save(theirs, tmp_path / "gpt2.bin")).eval()
    again = GPT2LMHeadModel(theirs.config).eval()
    missing, unexpected = again.transformer.load_state_dict(ours.pretrained_state(), strict=False)
    assert not missing and not unexpected
    again.tie_weights()
    tokens = torch.randint(0, 300, (2, 20))
    with torch.inference_mode():
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits)


def test_prefix_and_buffers_of_old_exports_are_accepted(tmp_path):
    model = hugging_face_gpt2(64, 2)
    bare = {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 48, 48), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    torch.save(bare, tmp_path / "bare.bin")
    one = Decoder.from_pretrained(tmp_path / "bare.bin")
    two = Decoder.from_pretrained(save(model, tmp_path / "prefixed.bin"))
    assert one.weights_hash == two.weights_hash


def test_content_hash_sees_values_names_and_shapes_but_not_the_format():
    state = {"a": torch.arange(6.0), "b": torch.ones(2)}
    assert content_hash(state) == content_hash({"b": torch.ones(2).half(), "a": torch.arange(6.0)})
    assert content_hash(state) != content_hash(state | {"b": torch.tensor([1.0, 1.001])})
    assert content_hash(state) != content_hash({"c": state["a"], "b": state["b"]})
    assert content_hash(state) != content_hash(state | {"a": state["a"].view(2, 3)})


@pytest.mark.parametrize("peft", [{}, {"prefix_length": 4, "prefix_hidden": 32}])
@pytest.mark.parametrize("fusion", ["cross", "prefix"])
def test_beams_that_change_places_go_on_with_their_own_past(tmp_path, peft, fusion):
    decoder = random_decoder(tmp_path, image_dim=128, fusion=fusion, **peft)
    image, chance = torch.randn(3, 5, 128), torch.Generator().manual_seed(0)
    with torch.inference_mode():
        context, cache = decoder.context(image), BeamCache(3, 2, 9)
        texts = torch.randint(0, 300, (3, 1, 1))
        decoder.hidden(texts[:, :, -1], context, cache)
        parents, images = torch.zeros(3, 2, dtype=torch.long), torch.arange(3)
        for step in range(1, 9):
            leaving = step == 5
            if leaving:  # the second image is done
                kept = torch.tensor([0, 2])
                parents, texts, images, context = parents[kept], texts[kept], images[kept], [layer.select(kept) for layer in context]
            cache.select(parents, kept if leaving else None)
            new = torch.randint(0, 300, (len(images), 2, 1), generator=chance)
            texts = torch.cat([texts.gather(1, parents[:, :, None].expand(-1, -1, texts.shape[2])), new], 2)
            found = decoder.hidden(texts[:, :, -1], context, cache)
            expected = decoder.hidden(texts.flatten(0, 1), decoder.context(image[images]))[:, -1].view(len(images), 2, -1)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            parents = torch.randint(0, 2, (len(images), 2), generator=chance)


@pytest.mark.parametrize("name", ["cross", "prefix"])
def test_text_sees_its_own_image_only(tmp_path, name):
    decoder = random_decoder(tmp_path, image_dim=128, fusion=name)
    image, tokens = torch.randn(2, 5, 128), torch.randint(0, 300, (4, 9))  # rows 0 and 1 are captions of image 0
    with torch.inference_mode():
        before, other = decoder(tokens, image), image.clone()
        other[1] += torch.randn(5, 128)
        after = decoder(tokens, other)
    torch.testing.assert_close(after[:2], before[:2])
    assert (after[2:] - before[2:]).abs().mean() > 0.01


def test_additions_start_as_a_no_op(tmp_path):
    path = save(hugging_face_gpt2(128, 2), tmp_path / "gpt2.bin")
    added = Decoder.from_pretrained(path, image_dim=64, cross_dim=64, lora_rank=4,
                                    lora_targets=("q", "k", "v", "attn_proj", "mlp")).eval()
    tokens = torch.randint(0, 300, (2, 9))
    with torch.inference_mode():
        torch.testing.assert_close(added(tokens, torch.randn(2, 5, 64)), Decoder.from_pretrained(path).eval()(tokens))


def test_only_additions_are_trainable(tmp_path):
    decoder = random_decoder(tmp_path, image_dim=64, lora_rank=4)
    trainable = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert trainable.isdisjoint(decoder.pretrained_names())
    assert trainable | decoder.pretrained_names() == {name for name, _ in decoder.named_parameters()}
    assert any(".cross." in name for name in trainable) and any("lora_A" in name for name in trainable)


PEFT = {
    "none": {},
    "lora": dict(lora_rank=4, lora_targets=("q", "k", "v", "attn_proj", "mlp")),
    "lora of q and v": dict(lora_rank=4, lora_targets=("q", "v")),
    "lora of embeddings": dict(lora_rank=4, lora_targets=("wte", "wpe")),
    "lora of the head": dict(lora_rank=4, lora_targets=("head",)),
    "lora of everything": dict(lora_rank=4, lora_targets=("q", "k", "v", "attn_proj", "mlp", "wte", "wpe", "head")),
    "adapters": dict(adapter_dim=8),
    "adapter after attention": dict(adapter_dim=8, adapter_places=("attn",)),
    "prefix": dict(prefix_length=3),
    "prefix of an MLP": dict(prefix_length=3, prefix_hidden=16),
    "prompt": dict(prompt_length=4),
    "ia3": dict(ia3=True),
    "all": dict(lora_rank=4, adapter_dim=8, prefix_length=3, prefix_hidden=16, prompt_length=4, ia3=True),
}
NO_OPS = [name for name in PEFT if "pr" not in name and name != "all"]


@pytest.fixture(params=PEFT)
def peft(request):
    return PEFT[request.param]


@pytest.fixture(params=["cross", "prefix"])
def fusion(request):
    return {"fusion": request.param, "image_dim": 128}


@pytest.mark.parametrize("name", NO_OPS)
def test_peft_starts_as_a_no_op(tmp_path, name, fusion):
    path = save(hugging_face_gpt2(128, 2), tmp_path / "gpt2.bin")
    tuned, plain = (Decoder.from_pretrained(path, **fusion, **options).eval() for options in (PEFT[name], {}))
    tokens, image = torch.randint(0, 300, (4, 9)), torch.randn(2, 5, 128)
    with torch.inference_mode():
        assert torch.equal(tuned(tokens), plain(tokens))
        torch.testing.assert_close(tuned(tokens, image), plain(tokens, image))


def test_gradients_reach_what_is_trained_and_nothing_else(tmp_path, peft, fusion):
    decoder = random_decoder(tmp_path, **fusion, **peft, dropout=0.1).train()
    image = torch.randn(2, 5, 128, requires_grad=True)
    decoder(torch.randint(0, 300, (4, 9)), image).square().mean().backward()
    assert image.grad.abs().sum() > 0
    for name, parameter in decoder.named_parameters():
        trained = name not in decoder.pretrained_names()
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == trained, name


def test_cache_and_context_change_nothing(tmp_path, peft, fusion):
    decoder = random_decoder(tmp_path, **fusion, **peft)
    image, tokens = torch.randn(3, 5, 128), torch.randint(0, 300, (6, 17))  # two captions an image
    with torch.inference_mode():
        whole = decoder.hidden(tokens, decoder.context(image))
        cache = Cache(17)
        context = decoder.context(image)
        steps = [decoder.hidden(tokens[:, :6], context, cache)]
        steps += [decoder.hidden(tokens[:, t:t + 1], context, cache) for t in range(6, 17)]
        torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)
        one = [decoder.hidden(tokens[row:row + 1], decoder.context(image[row // 2:row // 2 + 1])) for row in range(6)]
        torch.testing.assert_close(torch.cat(one), whole, atol=1e-5, rtol=1e-5)
        some = torch.tensor([2, 0])
        chosen = decoder.hidden(tokens[[4, 5, 0, 1]], [layer.select(some) for layer in decoder.context(image)])
        torch.testing.assert_close(chosen, whole[[4, 5, 0, 1]], atol=1e-5, rtol=1e-5)
        assert (decoder.hidden(tokens) - whole).abs().mean() > 0.01  # the image matters
        cache = Cache(17)
        alone = [decoder.hidden(tokens[:, t:t + 1], cache=cache) for t in range(17)]
        torch.testing.assert_close(torch.cat(alone, 1), decoder.hidden(tokens), atol=1e-5, rtol=1e-5)


def test_text_is_causal_whatever_stands_before_it(tmp_path, peft, fusion):
    decoder = random_decoder(tmp_path, **fusion, **peft)
    image, tokens = torch.randn(2, 5, 128), torch.randint(0, 299, (4, 9))
    later = tokens.clone()
    later[:, 6:] += 1
    with torch.inference_mode():
        before, after = decoder(tokens, image), decoder(later, image)
    torch.testing.assert_close(after[:, :6], before[:, :6])
    assert (after[:, 6:] - before[:, 6:]).abs().mean() > 0.01


def test_trained_state_brings_the_decoder_back(tmp_path, peft, fusion):
    decoder = random_decoder(tmp_path, **fusion, **peft)
    state = decoder.trained_state()
    assert state.keys().isdisjoint(decoder.pretrained_names())
    again = Decoder.from_pretrained(tmp_path / "gpt2.bin", **fusion, **peft | {"prefix_hidden": 0}).eval()
    assert state.keys() == {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    again.load_state_dict(state, strict=False)
    tokens, image = torch.randint(0, 300, (2, 9)), torch.randn(2, 5, 128)
    with torch.inference_mode():
        assert torch.equal(again(tokens, image), decoder(tokens, image))


@pytest.mark.parametrize("name", [name for name in PEFT if "lora" in name] + ["all"])
def test_merged_lora_gives_the_same_outputs(tmp_path, name, fusion):
    decoder = random_decoder(tmp_path, **fusion, **PEFT[name])
    tokens, image, some = torch.randint(0, 300, (2, 9)), torch.randn(2, 5, 128), torch.tensor([3, 77, 299])
    with torch.inference_mode():
        before, few = decoder(tokens, image), decoder(tokens, image, some)
        unscaled = [layer.scaling for layer in decoder.lora_layers()]
        for layer in decoder.lora_layers():
            layer.scaling = 0
        without = decoder(tokens, image)
        for layer, scaling in zip(decoder.lora_layers(), unscaled):
            layer.scaling = scaling
        decoder.merge_lora()
        torch.testing.assert_close(decoder(tokens, image), before, atol=1e-5 * before.std().item(), rtol=1e-5)
        torch.testing.assert_close(decoder(tokens, image, some), few, atol=1e-5 * before.std().item(), rtol=1e-5)
    assert (before - without).abs().mean() > 0.01


def test_image_tokens_see_each_other_and_a_prompt_sees_them(tmp_path):
    decoder = random_decoder(tmp_path, fusion="prefix", image_dim=128, prompt_length=3, prefix_length=2)
    image = torch.randn(1, 5, 128)
    last, prompt, change = image.clone(), decoder.prompt.weight, torch.randn(128)
    last[0, 4] += change
    with torch.inference_mode():
        before, after = (decoder.context(tokens)[1].before[0] for tokens in (image, last))  # keys of layer 1
        assert before.shape == (1, 2, 2 + 5 + 3, 64)
        changed = (before - after).abs().amax((0, 1, 3)) > 1e-4
        assert changed.tolist() == [False] * 2 + [True] * 8
        prompt[2] += change
        changed = (decoder.context(last)[1].before[0] - after).abs().amax((0, 1, 3)) > 1e-4
        assert changed.tolist() == [False] * 9 + [True]  # neither images nor the prompt before it see its end


def test_attention_to_an_image_prefix_is_that_of_the_forward_pass(tmp_path):
    decoder = random_decoder(tmp_path, fusion="prefix", image_dim=128, prompt_length=3, prefix_length=2)
    image, tokens, attentions = torch.randn(2, 5, 128), torch.randint(0, 300, (4, 9)), []
    with torch.inference_mode():
        context = decoder.context(image)
        with_weights = decoder.hidden(tokens, context, attentions=attentions)
        torch.testing.assert_close(with_weights, decoder.hidden(tokens, context), atol=1e-5, rtol=1e-5)
        assert [weights.shape for weights in attentions] == [(4, 2, 9, 5)] * 2
        block = decoder.h[0]  # by hand, third caption
        q, k, _ = block.attn.c_attn(block.ln_1(decoder.wte(tokens[2]) + decoder.wpe.weight[:9])).chunk(3, -1)
        q, k = (x.view(9, 2, 64).transpose(0, 1) for x in (q, k))
        scores = q @ torch.cat([context[0].before[0][1], k], 1).mT / 8
        scores = scores.masked_fill(~torch.ones(9, 19, dtype=torch.bool).tril(10), -torch.inf)
        torch.testing.assert_close(attentions[0][2], scores.softmax(-1)[..., 2:7])


@pytest.mark.parametrize("more", [(), ("wte",), ("head",), ("wte", "wpe", "head")])
@pytest.mark.parametrize("training", [True, False])
def test_lora_merged_for_a_while_leaves_no_trace(tmp_path, training, more):
    decoder = random_decoder(tmp_path, image_dim=64, lora_rank=4, lora_targets=("q", "v", "mlp", *more), dropout=0.0)
    decoder.train(training)
    tokens, image = torch.randint(0, 300, (2, 9)), torch.randn(2, 5, 64)
    before, output = {name: value.clone() for name, value in decoder.state_dict().items()}, decoder(tokens, image)
    addresses = [parameter.data_ptr() for parameter in decoder.parameters()]
    with torch.inference_mode(), decoder.merged_lora():
        torch.testing.assert_close(decoder(tokens, image), output, atol=1e-4, rtol=1e-4)
        assert not torch.equal(decoder.h[0].mlp.c_fc.weight, before["h.0.mlp.c_fc.weight"])
        assert not decoder.lora_layers()
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    assert addresses == [parameter.data_ptr() for parameter in decoder.parameters()]
    assert all(module.training == training for module in decoder.modules())
    again = decoder(tokens, image)
    assert torch.equal(again, output)
    again.sum().backward()
    assert decoder.h[0].mlp.c_fc.lora_A.grad.abs().sum() > 0


def test_lora_merged_for_a_while_keeps_its_dropout(tmp_path):
    decoder = random_decoder(tmp_path, lora_rank=4, lora_dropout=0.1).train()
    with decoder.merged_lora():
        pass
    assert all(module.training for module in decoder.modules())


def test_attention_weights_are_those_of_the_forward_pass(tmp_path):
    decoder = random_decoder(tmp_path, image_dim=64, cross_dim=192)
    tokens, image, attentions = torch.randint(0, 300, (6, 9)), torch.randn(3, 5, 64), []
    with torch.inference_mode():
        context = decoder.context(image)
        with_weights = decoder.hidden(tokens, context, attentions=attentions)
        torch.testing.assert_close(with_weights, decoder.hidden(tokens, context), atol=1e-5, rtol=1e-5)
    assert [weights.shape for weights in attentions] == [(6, 3, 9, 5)] * 2  # layers of (R, H, T, N)
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(6, 3, 9))
    # The second caption of the second image, first layer, worked out by hand.
    block = decoder.h[0]
    with torch.inference_mode():
        x = decoder.wte(tokens[3:4]) + decoder.wpe.weight[:9]
        x = x + block.attn(block.ln_1(x))
        q = block.cross.c_q(block.ln_cross(x)).view(9, 3, 64).transpose(0, 1)
        k = block.cross.c_kv(image[1]).chunk(2, -1)[0].view(5, 3, 64).transpose(0, 1)
        torch.testing.assert_close(attentions[0][3], attention_weights(q, k))
        torch.testing.assert_close(attentions[0][3], torch.softmax(q @ k.mT / 8, -1))


def test_wrong_files_are_named_in_one_sentence(tmp_path):
    good = {name: tensor.clone() for name, tensor in hugging_face_gpt2(64, 2).transformer.state_dict().items()}
    cases = {
        "an encoder's": {"patch_embed.weight": torch.ones(3, 3)},
        "a layer short": {name: tensor for name, tensor in good.items() if name != "h.0.mlp.c_fc.bias"},
        "a shape off": good | {"h.1.ln_1.weight": torch.ones(65)},
        "a tensor more": good | {"h.1.attn.gate": torch.ones(1)},
        "heads of 50": {name: tensor[..., :50] for name, tensor in good.items()},
    }
    for name, state in cases.items():
        torch.save(state, tmp_path / "wrong.bin")
        with pytest.raises(UserError, match="wrong.bin|multiple"):
            Decoder.from_pretrained(tmp_path / "wrong.bin")
            pytest.fail(name)
