"""perceiver-io beside our model: the same weights in both, all of them off their defaults."""

import functools
import random
import runpy
import warnings
from pathlib import Path

import jax
import numpy as np
from conftest import import_reference
from small_models import left_pads, quick_jit

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig
from perceiver_ar_jax.conversion import to_flax, to_torch
from perceiver_ar_jax.conversion.perceiver_io import FREQUENCIES
from perceiver_ar_jax.training import (
    Batch,
    OptimizerConfig,
    TrainState,
    make_optimizer,
    train_step,
)
from perceiver_ar_jax.training.step import loss_sum

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = import_reference("torch")
    clm = import_reference("perceiver.model.text.clm")
torch.set_num_threads(1)  # on a busy machine threads wait for each other longer than they compute

# Its package imports training scripts and so libraries that we have no use for.
_lrs = Path(clm.__file__).parents[3] / "scripts" / "lrs.py"
CosineWithWarmupLR = runpy.run_path(str(_lrs))["CosineWithWarmupLR"]


def random_config(seed: int, **changes) -> PerceiverARConfig:
    """A small config in which every option of the reference is drawn at random."""
    draw = random.Random(seed)
    layers = draw.choice([0, 1, 2, 3])
    heads = draw.choice([1, 2, 4])
    max_latents = draw.choice([1, 4, 7, 12])
    fields = {
        "vocab_size": draw.choice([11, 50, 262]),
        "max_latents": max_latents,
        "max_seq_len": max_latents + draw.choice([0, 1, 9, 20]),
        "num_heads": heads,
        "num_channels": heads * draw.choice([2, 6, 8, 16]),
        "max_heads_parallel": draw.choice([None, 1, 2, 3]),
        "num_self_attention_layers": layers,
        "num_self_attention_rotary_layers": draw.choice([-1, 0, 1, 2]),
        "self_attention_widening_factor": draw.choice([1, 2, 4]),
        "cross_attention_widening_factor": draw.choice([1, 2, 4]),
        "output_norm": draw.random() < 0.5,
        "output_bias": draw.random() < 0.5,
        "abs_pos_emb": draw.random() < 0.5,
        "init_scale": draw.choice([0.02, 0.1]),
    }
    return PerceiverARConfig(**fields | changes)


def reference_config(config: PerceiverARConfig):
    """perceiver-io's config of the same model."""
    names = clm.CausalLanguageModelConfig.__dataclass_fields__
    shared = {name: value for name, value in config.to_dict().items() if name in names}
    return clm.CausalLanguageModelConfig(**shared)


def reference_model(config: PerceiverARConfig, seed: int):
    """perceiver-io's model of this config in evaluation mode, every parameter moved at random."""
    torch.manual_seed(seed)
    model = clm.CausalLanguageModel(reference_config(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def hugging_face_model(backend):
    """A model of perceiver-io as `from_pretrained` gives it."""
    config = clm.PerceiverCausalLanguageModelConfig(backend.config)
    return clm.PerceiverCausalLanguageModel(config, backend_model=backend).eval()


def our_model(reference, config: PerceiverARConfig):
    """Our model and parameters, converted from a model of perceiver-io."""
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    config = config.replace(rotary_inv_freq=tuple(tensors[FREQUENCIES]))
    return PerceiverAR(config), to_flax(tensors, config)


def random_input(config: PerceiverARConfig, seed: int, batch: int = 3, lengths=None):
    """Token ids, prefix length and a left pad mask that stays in the prefix (numpy, int, numpy).

    `lengths` are those of prefix and latents; drawn at random if None.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, config.max_prefix_len + 1), rng.integers(1, config.max_latents + 1)
    prefix_len, latents = map(int, lengths or drawn)
    tokens = rng.integers(0, config.vocab_size, (batch, prefix_len + latents))
    pads = rng.integers(0, prefix_len + 1, batch)
    return tokens, prefix_len, left_pads(pads, tokens.shape[1])


def reference_logits(reference, tokens, prefix_len, pads):
    """Logits of the latents, (B, L, V), a torch tensor that can be differentiated."""
    return reference(
        torch.tensor(tokens), prefix_len=prefix_len, pad_mask=torch.tensor(pads)
    ).logits


def relative_error(actual, expected) -> float:
    """max|actual - expected| / max(1, max|expected|)."""
    expected = np.asarray(expected)
    difference = np.abs(np.asarray(actual) - expected).max(initial=0.0)
    return float(difference / max(1.0, np.abs(expected).max(initial=0.0)))


def assert_close_to_reference(actual, expected, tolerance: float):
    """|actual - expected| stays within tolerance × max(1, max|expected|)."""
    assert np.shape(actual) == np.shape(expected)
    assert relative_error(actual, expected) <= tolerance


def logit_errors(seed: int) -> list[float]:
    """Relative errors of a random config's logits on three inputs.

    Two inputs share lengths drawn at random, since each new shape takes a compilation; the third
    is as long as the model reads.
    """
    config = random_config(seed)
    reference = reference_model(config, seed)
    model, params = our_model(reference, config)
    apply = quick_jit(model.apply, static_argnames="prefix_len")
    first = random_input(config, 0)
    shared = first[1], first[0].shape[1] - first[1]
    full = config.max_prefix_len, config.max_latents
    errors = []
    for tokens, prefix_len, pads in (
        first,
        random_input(config, 1, lengths=shared),
        random_input(config, 2, lengths=full),
    ):
        with torch.no_grad():
            expected = reference_logits(reference, tokens, prefix_len, pads)
        actual = apply({"params": params}, tokens, prefix_len=prefix_len, pad_mask=pads)
        assert actual.shape == expected.shape
        errors.append(relative_error(actual, expected))
    return errors


def gradient_errors(seed: int) -> dict[str, float]:
    """Of the mean loss of a random config, by tensor of perceiver-io: max|difference| / max|it|.

    Not as narrow as 2 channels: a LayerNorm makes ±1 of any two, and gradients through it are
    rounding errors (the reference's float32 is then 2e-4 from its own float64).
    """
    config = random_config(seed, num_channels=32)
    reference = reference_model(config, seed)
    model, params = our_model(reference, config)
    tokens, prefix_len, pads = random_input(config, seed)
    targets = np.random.default_rng(seed).integers(0, config.vocab_size, tokens.shape)

    theirs = reference_loss(reference, tokens, targets, prefix_len, pads)
    theirs.backward()

    @quick_jit
    @jax.grad
    def gradients(params):
        batch = Batch(tokens, targets, pads)
        weights = np.ones_like(targets[:, prefix_len:], np.float32)
        loss = loss_sum(params, batch, weights, model=model, prefix_len=prefix_len)
        return loss / weights.sum()

    ours = to_torch(gradients(params), model.config)
    errors = {}
    for name, parameter in reference.named_parameters():
        expected = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        difference, largest = np.abs(ours[name] - expected).max(), np.abs(expected).max()
        errors[name] = float(difference / largest) if difference else 0.0
    return errors


def cached_logit_errors(seed: int, steps: int = 14) -> list[float]:
    """Relative errors of a prompt's last logits and of those of each decoding step after it.

    The steps run past max_latents and max_seq_len. The caches of the reference are cut as its
    `generate` cuts them, which fails for max_latents=1.
    """
    config = random_config(seed, max_latents=3 + seed % 3, max_seq_len=8 + seed % 5)
    backend = reference_model(config, seed)
    reference = hugging_face_model(backend)
    model, params = our_model(backend, config)
    lengths = seed % config.max_prefix_len + 1, 2
    tokens, prefix_len, pads = random_input(config, seed, lengths=lengths)

    @functools.partial(quick_jit, static_argnums=1)
    def prefill(tokens, prefix_len, pads):
        variables = {"params": params}
        hidden, cache = model.apply(variables, tokens, prefix_len, pads, method="prefill")
        cache = cache.with_room(columns=config.max_seq_len, latents=config.max_latents)
        return model.apply(variables, hidden, method="logits")[:, -1], cache

    @quick_jit
    def decode(tokens, cache):
        variables = {"params": params}
        hidden, cache = model.apply(variables, tokens, cache, method="decode_step")
        return model.apply(variables, hidden[:, None], method="logits")[:, 0], cache

    new_tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (steps, len(tokens)))
    actual, cache = prefill(tokens, prefix_len, pads)
    past, errors = None, []
    for new in new_tokens:
        inputs = reference.prepare_inputs_for_generation(
            torch.tensor(tokens),
            past_key_values=past,
            attention_mask=torch.tensor(~pads).long(),
            use_cache=True,
            prefix_len=prefix_len,
        )
        with torch.no_grad():
            expected = reference(**inputs)
        past = expected.past_key_values
        errors.append(relative_error(actual, expected.logits[:, -1]))
        actual, cache = decode(new, cache)
        tokens = np.concatenate([tokens, new[:, None]], axis=1)
        pads = np.pad(pads, ((0, 0), (0, 1)))
    return errors


def reference_loss(model, tokens, targets, prefix_len: int, pads) -> torch.Tensor:
    """The mean of -log p of the latents' targets, to differentiate."""
    logits = reference_logits(model, tokens, prefix_len, pads)
    targets = torch.tensor(targets[:, prefix_len:])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def reference_training(reference, settings: OptimizerConfig):
    """One more training step of the reference: a function of a batch that returns its loss.

    As perceiver-io trains: torch's AdamW, its own schedule, gradients clipped to a norm.
    """
    optimizer = torch.optim.AdamW(
        reference.parameters(),
        lr=settings.learning_rate,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    schedule = CosineWithWarmupLR(
        optimizer,
        training_steps=settings.total_steps,
        warmup_steps=settings.warmup_steps,
        min_fraction=settings.min_fraction,
    )

    def step(tokens, targets, prefix_len, pads) -> float:
        optimizer.zero_grad()
        loss = reference_loss(reference, tokens, targets, prefix_len, pads)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), settings.clip_norm)
        optimizer.step()
        schedule.step()
        return loss.item()

    return step


def adamw_losses(*, abs_pos_emb: bool, steps: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Losses of our `train_step` and of the reference's training on the same batches."""
    config = random_config(
        0,
        vocab_size=50,
        max_seq_len=24,
        max_latents=8,
        num_channels=32,
        num_self_attention_layers=2,
        output_norm=True,
        cross_attention_dropout=0.0,
        abs_pos_emb=abs_pos_emb,
    )
    settings = OptimizerConfig(learning_rate=3e-3, warmup_steps=10, total_steps=steps)
    reference = reference_model(config, 0).train()
    model, params = our_model(reference, config)
    reference_step = reference_training(reference, settings)
    state = TrainState.create(params=params, tx=make_optimizer(settings))
    step = quick_jit(
        functools.partial(train_step, model=model, key=jax.random.key(0)),
        static_argnames="prefix_len",
    )
    ours, theirs = [], []
    lengths = config.max_prefix_len, config.max_latents
    for seed in range(steps):
        tokens, prefix_len, pads = random_input(config, seed, batch=8, lengths=lengths)
        targets = (tokens * 5 + 1) % config.vocab_size  # a rule that can be learned
        state, metrics = step(state, Batch(tokens, targets, pads), prefix_len=prefix_len)
        ours.append(float(metrics["loss"]))

        theirs.append(reference_step(tokens, targets, prefix_len, pads))
    return np.asarray(ours), np.asarray(theirs)
