import importlib
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[3] / "scripts" / "small_editor"


@pytest.fixture(scope="session")
def trainer():
    """The training script as a module, its neighbours importable."""
    sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module("train_small_editor")


@pytest.fixture
def tiny_pipeline():
    """A small editor of two narrow blocks whose weights are random everywhere."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from ditrim.runtime.small_editor.modules import PixelVAE, WordEmbedder, build_transformer
    from ditrim.runtime.small_editor.pipeline import SmallEditPipeline
    from ditrim.runtime.small_editor.vocabulary import WordTokenizer

    torch.manual_seed(0)
    transformer = build_transformer(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6)
    )
    for weight in transformer.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    tokenizer = WordTokenizer()
    pipeline = SmallEditPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=PixelVAE(),
        text_encoder=WordEmbedder(len(tokenizer)),
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
