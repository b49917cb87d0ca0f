"""Fine-tuning the image encoder: it learns the captions, keeps its classes, and the written file loads like any other encoder."""

import pytest
import torch
from conftest import CNN, stopping
from safetensors.torch import load_file

import training
from cli import UserError
from encoder import ImageEncoder, load_encoder
from p4_finetune_encoder import EncoderTrainer, Settings


def settings(**changes):
    return Settings(**{"encoder": CNN, "image_size": 64, "decoder": "decoder.safetensors", "epochs": 2, "batch_size": 10,
                       "selection": (4,)} | changes)


def weights(folder="checkpoints"):
    return load_file(f"{folder}/{CNN}_captions.safetensors")


@pytest.fixture
def trained(place):
    """The folder after a run, the trainer and what each epoch was worth."""
    trainer = EncoderTrainer(settings())
    return place, trainer, trainer.fit()


def test_what_it_writes_is_an_encoder_like_any_other(trained, monkeypatch):
    place, trainer, history = trained
    (place / "checkpoints" / f"{CNN}_captions.safetensors").rename(place / f"{CNN}_captions.safetensors")
    encoder = load_encoder(f"{CNN}_captions", 64)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode(), trainer.average.in_place():
        expected = trainer.clip.encoder(images)
    torch.testing.assert_close(encoder(images), expected, atol=2e-2, rtol=2e-2)  # its matrices are in fp16
    before = load_encoder(CNN, 64)
    assert (encoder(images) - before(images)).abs().max() > 1e-3 and encoder.weights_hash != before.weights_hash
    assert encoder.class_names == before.class_names and not any(p.requires_grad for p in encoder.parameters())
    assert [entry["epoch"] for entry in history] == [1, 2, 3] and 0 <= history[-1]["text to image@1"] <= 1


def test_heads_learn_alone_at_first(place):
    before = load_file(place / f"{CNN}.safetensors")
    trainer = EncoderTrainer(settings(head_epochs=2, epochs=1, output="a"))
    head = trainer.clip.image_head.stats.weight.detach().clone()
    for step in range(4):
        trainer.step(step)
    after = trainer.clip.encoder.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name in after)
    assert not torch.equal(trainer.clip.image_head.stats.weight, head)
    trainer.step(4)
    assert any(not torch.equal(value, before[name]) for name, value in trainer.clip.encoder.model.state_dict().items())


def test_statistics_of_batch_norms_stay(trained):
    place, _, _ = trained
    before, after = load_file(place / f"{CNN}.safetensors"), weights()
    assert before.keys() == after.keys()
    for name, value in before.items():
        if "running" in name or name.startswith("classifier.bias"):
            assert torch.equal(value, after[name]), name
        assert after[name].dtype == (torch.float16 if value.ndim > 1 else value.dtype)


@pytest.mark.parametrize("name", ["contrast", "caption", "keep"])
def test_each_loss_teaches_the_encoder(place, name):
    trainer = EncoderTrainer(settings(output=name))
    torch.manual_seed(0)
    for parameter in trainer.captioner.trained_parameters().values():  # what is 0 at first lets no gradient through
        parameter.data.normal_(std=0.1)
    for weight in trainer.weights.values():
        weight.data.mul_(1.01)
    numbers = torch.arange(6)
    trainer.losses(trainer.pixels[numbers].float(), numbers, [torch.tensor([0])] * 6)[name].backward()
    gradients = {part: weight.grad for part, weight in trainer.weights.items() if weight.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values()) and sum(g.abs().sum() for g in gradients.values()) > 0


def test_what_is_kept_costs_nothing_at_first(place):
    trainer = EncoderTrainer(settings())
    numbers = torch.arange(6)
    assert abs(trainer.losses(trainer.pixels[numbers].float(), numbers, [torch.tensor([0])] * 6)["keep"].item()) < 1e-4


def test_a_run_that_was_stopped_goes_on_bit_for_bit(place, monkeypatch):
    EncoderTrainer(settings(output="whole")).fit()
    count = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(training, "Interruption", stopping(lambda: next(count) >= 3))
        assert EncoderTrainer(settings(output="parts")).fit() is None
    assert EncoderTrainer(settings(output="parts")).fit()
    whole, parts = weights("whole"), weights("parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_an_encoder_that_is_not_frozen_gives_the_same_features(place):
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    frozen, open_one = load_encoder(CNN, 64), load_encoder(CNN, 64, frozen=False)
    torch.testing.assert_close(open_one(images).detach(), frozen(images), atol=1e-4, rtol=1e-3)
    assert all(parameter.requires_grad for parameter in open_one.model.parameters())
    assert not open_one.train().model.training


def test_what_cannot_be_is_said_in_a_line(place):
    with pytest.raises(UserError, match="no classifier"):
        from safetensors.torch import save_file

        state = {name: value for name, value in load_file(f"{CNN}.safetensors").items() if not name.startswith("classifier")}
        save_file(state, f"{CNN}.safetensors")
        EncoderTrainer(settings())
    with pytest.raises(UserError, match="is fine-tuned already"):
        EncoderTrainer(settings(encoder=f"{CNN}_captions"))
    with pytest.raises(UserError, match="--selection takes whole numbers"):
        settings(selection=("abc",))
    with pytest.raises(UserError, match="above 0"):
        settings(contrast=0.0, caption=0.0)
    with pytest.raises(UserError, match="p4_finetune_encoder.py makes such files"):
        ImageEncoder(f"{CNN}_captions")
