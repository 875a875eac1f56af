from headrace.core.shape import BF16, KV_BF16, KVFormat, Latent, ModelShape, WeightFormat

TINY = ModelShape(
    layers=2, hidden=8, heads=4, kv_heads=2, head_dim=2, ffn=16, vocab=32, max_context_tokens=64, tied_embedding=True
)


def test_a_dense_model_counts_every_matrix_once() -> None:
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # q, k and v, o
    assert TINY.attention_weights == attention
    assert TINY.weights == 2 * (attention + 3 * 8 * 16) + 32 * 8
    assert TINY.active_weights == TINY.weights


def test_a_mixture_counts_idle_experts_in_weights_only() -> None:
    moe = ModelShape(
        layers=3, hidden=8, heads=4, kv_heads=4, head_dim=2, ffn=16, vocab=32, max_context_tokens=64, experts=4,
        experts_per_token=1, shared_experts=1, dense_layers=1, dense_ffn=40,
    )  # fmt: skip
    expert, attention, router = 3 * 8 * 16, 4 * 8 * 8, 8 * 4
    layers = 3 * attention + 2 * (5 * expert + router) + 3 * 8 * 40
    assert moe.weights == layers + 2 * 32 * 8
    assert moe.active_weights == layers - 2 * 3 * expert + 32 * 8


def test_latent_attention_caches_one_vector_and_the_rotary_key() -> None:
    latent = Latent(kv_rank=6, rope_dim=2, value_dim=3, q_rank=5)
    shape = ModelShape(
        layers=2, hidden=8, heads=4, kv_heads=4, head_dim=7, ffn=16, vocab=32, max_context_tokens=64, latent=latent
    )
    assert KV_BF16.bytes_per_token(shape) == 2 * (6 + 2) * 2
    q, kv_down, kv_up, o = 5 * (8 + 4 * 7), 8 * (6 + 2), 6 * 4 * (5 + 3), 4 * 3 * 8
    assert shape.attention_weights == q + kv_down + kv_up + o


def test_an_ungated_feed_forward_has_two_matrices() -> None:
    shape = ModelShape(
        layers=1, hidden=8, heads=4, kv_heads=4, head_dim=2, ffn=32, vocab=32, max_context_tokens=64, gated=False
    )
    assert shape.ffn_weights == 2 * 8 * 32


def test_formats_count_scales_per_group() -> None:
    assert BF16.bytes_per_weight == 2
    assert WeightFormat("w4g64", 4, group=64, overhead_bits=32).bytes_per_weight == 4.5 / 8
    assert KVFormat("int8", 8).bytes_per_token(TINY) == 2 * 2 * 4
