"""config.json: both rotary spellings agree with `transformers`, and no impossible or unknown value gets through."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.models.detect import detect
from anyquant.store.open import open_checkpoint
from models.altered import Altered
from support.checkpoints import make_checkpoint

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    base = tmp_path_factory.mktemp("configs")
    families = ("llama", "mistral", "qwen2", "phi3", "qwen3_moe")
    return {family: open_checkpoint(make_checkpoint(base / family, family)) for family in families}


def through_transformers(checkpoint: Checkpoint, folder: Path) -> Any:
    """The config as the reference reads it."""
    (folder / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    return transformers.AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_theta": 50000.0}),
        ("llama", {"rope_theta": 50000.0, "rope_scaling": LLAMA3}),
        ("llama", {"rope_theta": 7e5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 1e5}}),
        ("llama", {}),
        ("qwen2", {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}),
        ("phi3", {"partial_rotary_factor": 0.5, "rope_theta": 2e4}),
        (
            "phi3",
            {
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32},
                "rope_theta": 2e4,
            },
        ),
        ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": None}),
    ],
)
def test_rotary_settings_agree_with_transformers(
    checkpoints: dict[str, Checkpoint], tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    checkpoint = Altered(checkpoints[family], {"rope_parameters": None} | changes)
    dimensions = detect(checkpoint).dimensions
    reference = through_transformers(checkpoint, tmp_path).rope_parameters
    assert dimensions.rope_theta == reference["rope_theta"]
    assert dimensions.rope_dim == dimensions.head_dim * reference.get("partial_rotary_factor", 1.0)
    scaling = {k: v for k, v in reference.items() if k not in ("rope_theta", "partial_rotary_factor", "type")}
    assert dict(dimensions.rope_scaling) == ({} if scaling["rope_type"] == "default" else scaling)


@pytest.mark.parametrize(
    ("family", "removed"),
    [("mistral", "sliding_window"), ("mistral", "num_key_value_heads"), ("qwen3", "head_dim")],
)
def test_a_field_that_is_not_there_is_what_transformers_takes(tmp_path: Path, family: str, removed: str) -> None:
    """A config may leave out what has the default value of its class, which is not always "none"."""
    settings = {"num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 64}
    config = {"head_dim": 128} if family == "qwen3" else {"sliding_window": 4096}
    folder = make_checkpoint(tmp_path / "model", family, blocks=1, config=settings | config)
    stored = json.loads((folder / "config.json").read_text())
    del stored[removed]
    (folder / "config.json").write_text(json.dumps(stored))
    reference = transformers.AutoConfig.from_pretrained(folder)
    found = detect(open_checkpoint(folder)).dimensions
    assert (found.window, found.kv_heads) == (getattr(reference, "sliding_window", None), reference.num_key_value_heads)
    assert found.head_dim == getattr(reference, "head_dim", None) or found.head_dim == 16


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"activation": "swiglu", "mlp_bias": False}),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 262144}, "use_mrope": False}),
        ("phi3", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}),
    ],
)
def test_notes_of_published_configs_are_no_obstacle(
    checkpoints: dict[str, Checkpoint], family: str, changes: dict[str, Any]
) -> None:
    """Fields of Falcon3, Qwen2.5-1M and Phi-4-mini that change nothing."""
    plain = detect(checkpoints[family])
    assert detect(Altered(checkpoints[family], changes)) == plain


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [
        ("mistral", {"sliding_window": 128}, 128),
        ("phi3", {"sliding_window": 200}, 200),
        ("qwen2", {"sliding_window": 64}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 64),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0, "layer_types": None}, 64),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "layer_types": None}, None),
    ],
)
def test_sliding_window(
    checkpoints: dict[str, Checkpoint], family: str, changes: dict[str, Any], window: int | None
) -> None:
    assert detect(Altered(checkpoints[family], changes)).dimensions.window == window


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "lama"}, "unknown model_type 'lama'; known: llama, mistral"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"residual_multiplier": 0.22}, "residual_multiplier = 0.22"),
        ("llama", {"sliding_window": 64}, "sliding_window = 64"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ("llama", {"rope_parameters": LLAMA3 | {"mrope_section": [1]}}, r"mrope_section = \[1\]"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "already quantized .*gptq"),
        ("mistral", {"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling"),
        ("mistral", {"attention_bias": True}, "attention_bias = True"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types = .* in some blocks only",
        ),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type = 'linear'.*phi3"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window = 64"),
    ],
)
def test_what_is_not_known_is_refused(
    checkpoints: dict[str, Checkpoint], family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        detect(Altered(checkpoints[family], changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": -256}, "hidden_size = -256"),
        ({"hidden_size": 256.0}, "hidden_size = 256.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers = 1073741824 is more than"),
        ({"num_hidden_layers": 3}, r"9 tensors \(model.layers.2.*missing"),
        ({"vocab_size": None}, "no vocab_size"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads = 3"),
        ({"head_dim": None, "num_attention_heads": 3, "num_key_value_heads": 3}, "hidden_size = 256 is not a multiple"),
        ({"num_key_value_heads": 4}, "k_proj.weight has shape"),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
        ({"rope_theta": 5.0}, "rope_theta is given twice"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta = nan"),
        ({"rope_parameters": [1]}, r"rope_parameters = \[1\] is not an object"),
        ({"rope_parameters": {"rope_type": "linear"}}, "linear has no factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor = '2'"),
        ({"model_type": None}, "model_type = None"),
    ],
)
def test_impossible_values_are_refused(
    checkpoints: dict[str, Checkpoint], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        detect(Altered(checkpoints["llama"], changes))


def test_older_configs_need_no_kv_heads_and_no_head_dim(checkpoints: dict[str, Checkpoint]) -> None:
    changes = {"head_dim": None, "dtype": None, "torch_dtype": "float32", "_name_or_path": "x", "pretraining_tp": 2}
    assert detect(Altered(checkpoints["llama"], changes)).dimensions.head_dim == 64
