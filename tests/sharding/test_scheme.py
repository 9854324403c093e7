"""The rule that chooses a scheme, on shapes where the answer is known."""

import dataclasses
import math

import pytest

from jaxserve.sharding.links import links_of
from jaxserve.sharding.scheme import SCHEMES, Case, Links, choose_scheme, estimate_s, refusal, sent_bytes

LLAMA = Case(num_devices=8, num_tokens=32768, num_heads=32, num_kv_heads=8, head_size=128, itemsize=2)
VIDEO = Case(num_devices=4, num_tokens=32768, num_heads=14, num_kv_heads=14, head_size=128, itemsize=2, causal=False)
TORUS = links_of("TPU v5 lite")
SWITCH = links_of("NVIDIA H100 80GB HBM3")


def test_bytes_of_the_table():
    """Llama-3-8B, 4,096 tokens on each of 8 devices: worked out by hand."""
    kv, q = 2 * 4096 * 8 * 128 * 2, 4096 * 32 * 128 * 2
    partial = 4096 * 32 * (128 * 4 + 4)
    assert sent_bytes("gather", LLAMA) == sent_bytes("ring", LLAMA) == sent_bytes("bidirectional", LLAMA) == 7 * kv
    assert sent_bytes("zigzag", LLAMA) == 7 * kv + 2 * q + kv
    assert sent_bytes("ulysses", LLAMA) == 7 * (2 * q + kv) // 8
    assert sent_bytes("tokenring", LLAMA) == 7 * (q + partial)
    assert sent_bytes("pass_q", LLAMA) == 8 * q + 7 * partial
    few = dataclasses.replace(LLAMA, num_kv_heads=2)
    assert sent_bytes("ulysses", few) == 7 * (2 * q + kv) // 8, "2 KV heads are repeated to 8"
    assert sent_bytes("ring", dataclasses.replace(LLAMA, window=4097)) == kv
    assert sent_bytes("ring", dataclasses.replace(LLAMA, window=4098)) == 2 * kv


def test_token_ring_sends_more_with_grouped_heads_and_less_out_with_all_of_them():
    assert sent_bytes("tokenring", LLAMA) > 4 * sent_bytes("ring", LLAMA)
    assert VIDEO.q_bytes == VIDEO.kv_bytes / 2


@pytest.mark.parametrize("links", [TORUS, SWITCH])
def test_all_estimates_are_possible(links: Links):
    """No scheme is faster than an even share of the work, and with endless links none is slower than the slowest share."""
    endless = dataclasses.replace(links, bytes_per_s=math.inf, start_s=0.0)
    flop = 4 * 32 * 128 * 32768**2 / 2
    even_s = flop / 8 / links.flop_per_s
    for scheme in SCHEMES:
        assert estimate_s(scheme, LLAMA, links) >= even_s * 0.999
        assert estimate_s(scheme, LLAMA, endless) <= even_s * 15 / 8 * 1.001
    balanced = {scheme for scheme in SCHEMES if estimate_s(scheme, LLAMA, endless) < even_s * 1.001}
    assert balanced == {"ulysses", "zigzag"}


def test_chooses_what_is_known_to_be_best():
    """With a switch Ulysses sends least; where heads do not divide, zig-zag is balanced; small prompts want one
    collective."""
    assert choose_scheme(LLAMA, SWITCH) == "ulysses"
    odd = dataclasses.replace(LLAMA, num_heads=30, num_kv_heads=6)
    assert choose_scheme(odd, SWITCH) == choose_scheme(odd, TORUS) == "zigzag"
    assert choose_scheme(dataclasses.replace(odd, num_tokens=64), SWITCH) == "gather"
    assert choose_scheme(dataclasses.replace(odd, window=1024), TORUS) == "ring", "one neighbour's keys are enough"
    slow = dataclasses.replace(TORUS, bytes_per_s=10e9)
    assert choose_scheme(VIDEO, slow) == "bidirectional", "one direction would take longer than the computing"


def test_never_chooses_what_is_refused():
    for num_heads in (30, 32):
        for window in (None, 100):
            for share in (1, 2, 3, 4096):
                case = dataclasses.replace(
                    LLAMA, num_heads=num_heads, num_kv_heads=2, window=window, num_tokens=8 * share
                )
                assert not refusal(choose_scheme(case, TORUS), case)


def test_devices_by_name():
    assert TORUS.is_torus and not SWITCH.is_torus
    assert links_of("NVIDIA B200").bytes_per_s > links_of("NVIDIA A100-SXM4-80GB").bytes_per_s
    assert links_of("cpu") == links_of("of no known kind")
