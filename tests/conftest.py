"""What several tests share."""
import os

os.environ.setdefault('MPLBACKEND', 'Agg')

from pathlib import Path

import pytest


@pytest.fixture(scope='session')
def repository(): return Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def pipe():
    from t2i.pipeline import TextToImage
    return TextToImage.from_preset('smoke', device='cpu')
