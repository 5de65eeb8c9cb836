import math

import torch

from megatron.nn.rotary import apply_rotary, inverse_frequencies, rotary_tables
from megatron.testing.tiny import model_config


def rotated_plainly(x, config):
    """cos x + sin rotate-half(x), position by position, in the textbook form."""
    frequencies = inverse_frequencies(config, torch.float64)
    half = len(frequencies)
    out = x.clone()
    for position in range(x.shape[0]):
        cos, sin = (position * frequencies).cos(), (position * frequencies).sin()
        a, b = x[position, ..., :half], x[position, ..., half : 2 * half]
        out[position, ..., :half] = a * cos - b * sin
        out[position, ..., half : 2 * half] = b * cos + a * sin
    return out


def test_rotation_and_its_gradient():
    for percent in (1.0, 0.5):
        config = model_config("llama", rotary_percent=percent)
        x = torch.randn(7, 2, 4, 8, dtype=torch.float64, requires_grad=True)
        rope = rotary_tables(config, 0, 7, x)
        torch.testing.assert_close(apply_rotary(x, rope), rotated_plainly(x, config))
        assert torch.autograd.gradcheck(lambda t, rope=rope: apply_rotary(t, rope), x)


def test_scores_depend_on_distance_only():
    config = model_config("llama")
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = []
    for start in (0, 11):
        turned_q = apply_rotary(q, rotary_tables(config, start + 5, start + 6, q))
        turned_k = apply_rotary(k, rotary_tables(config, start + 2, start + 3, k))
        scores.append((turned_q * turned_k).sum())
    torch.testing.assert_close(*scores)


def test_linear_scaling_divides_positions():
    x = torch.randn(9, 1, 1, 8, dtype=torch.float64)
    slow = rotary_tables(model_config("llama", rotary_seq_len_interpolation_factor=2.0), 0, 9, x)
    fast = rotary_tables(model_config("llama"), 0, 9, x)
    torch.testing.assert_close(slow[0][::2], fast[0][:5])


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    config = model_config("llama", use_rope_scaling=True, rotary_base=500000.0, kv_channels=64)
    plain = inverse_frequencies(model_config("llama", rotary_base=500000.0, kv_channels=64))
    scaled = inverse_frequencies(config)
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    torch.testing.assert_close(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert between.any() and ((scaled < plain) & (scaled > plain / 8))[between].all()
