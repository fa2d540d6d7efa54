"""What each callback, added with no arguments, must do in each client."""

from tests.clients.harness import CALLBACKS

OUTCOMES = ("W", "O", "W/O")
"""`"W"`: it logs at least one finite value. `"O"`: it is off, and one warning says why and what to do. Or either."""

# Columns in the order of CALLBACKS: communities, entropy, refinement, observers, topology, paths.
# Those that need activations only work everywhere. Observers work where a batch holds targets. Refinement works where
# losses train linear or convolution layers. Paths work where a network gives logits for each sample and single samples
# can be selected, so not on graphs. Where there is one label for each position and the default reduction is the mean
# over positions, a sentence may ask for another reduction.
_ROWS = {
    "classifier": "W W W W W W",
    "multi_label": "W W W W W W",
    "binary_logit": "W W W W W W",
    "regression": "W W W W W O",
    "stateful_rnn": "W W W W W W",
    "encoder_text": "W W W W W W",
    "no_forward": "W W W W W W",
    "gan": "W W O W W O",
    "vae": "W W W W W O",
    "autoencoder": "W W W O W O",
    "simclr": "W W W W W O",
    "simclr_unlabelled": "W W W O W O",
    "lightly_simclr": "W W W W W O",
    "detection": "W W W W W O",
    "fcn": "W W W W/O W W/O",
    "smp_unet": "W W W W/O W W/O",
    "timm_resnet18": "W W W W W W",
    "timm_vit_tiny": "W W W W W W",
    "timm_convnext_atto": "W W W W W W",
    "timm_mobilenetv3": "W W W W W W",
    "timm_resnet18_1000": "W W W/O W/O W W/O",
    "bert_forward": "W W W W W W",
    "bert_model": "W W W W W W",
    "bert_forward_lora": "W W W W W W",
    "bert_model_lora": "W W W W W W",
    "gpt2_lm": "W W W W/O W W/O",
    "gpt2_lm_lora": "W W W W/O W W/O",
    "vit_pixel_values": "W W W W W W",
    "vit_pixel_values_lora": "W W W W W W",
    "darts_nbeats": "W W W W W O",
    "darts_nbeats_no_val": "W W W W W O",
    "darts_rnn": "W W W W W O",
    "darts_rnn_no_val": "W W W W W O",
    "darts_tft": "W W W W W O",
    "darts_tft_no_val": "W W W W W O",
    "forecasting_tft": "W W W W W O",
    "tabular_classification": "W W W W W W",
    "tabular_regression": "W W W W W O",
    "pyg_graphs": "W W W W W O",
    "pyg_nodes": "W W W W/O W O",
}

EXPECTED: dict[str, dict[str, str]] = {
    name: dict(zip(CALLBACKS, row.split(), strict=True)) for name, row in _ROWS.items()
}
"""Client -> callback -> outcome."""

assert all(outcome in OUTCOMES for row in EXPECTED.values() for outcome in row.values())

PLANTED = (
    "classifier",
    "multi_label",
    "binary_logit",
    "regression",
    "no_forward",
    "vae",
    "simclr",
    "timm_resnet18",
    "timm_vit_tiny",
    "timm_convnext_atto",
    "timm_mobilenetv3",
    "vit_pixel_values",
    "tabular_classification",
    "tabular_regression",
    "pyg_graphs",
    "pyg_nodes",
)
"""Clients whose data show their target so plainly that some layer must tell it, trained or not."""
