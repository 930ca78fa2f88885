"""All chapters from a foreign working directory, as papermill runs them."""
import json

import pandas as pd
import pytest

from shell import shell
from t2i.core import EXHIBITS


@pytest.fixture(scope='module')
def everything(tmp_path_factory):
    "Output of `t2i figures --preset smoke`, and the folder that it wrote."
    out, elsewhere = tmp_path_factory.mktemp('figures'), tmp_path_factory.mktemp('elsewhere')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        result = shell('figures', '--preset', 'smoke', '--out', out)
    assert not list(elsewhere.iterdir())
    return result, out


def test_every_chapter_runs_and_writes_its_figures(everything):
    result, out = everything
    assert result.exit_code == 0, result.output
    written = {p.name for p in (out/'smoke').iterdir()}
    assert written == {f'{e.stem}{s}' for e in EXHIBITS.values() for s in e.suffixes}
    assert 'not written' not in result.output


def test_the_table_has_every_variant(everything):
    table = pd.read_csv(everything[1]/'smoke/table_5_1.csv')
    assert len(table) >= 4 and table.notna().any().all()  # three variants, and real pictures against real ones


def test_a_failing_chapter_is_named_and_does_not_stop_the_others(tmp_path):
    result = shell('figures', '--preset', 'thesis', '--only', '5.11', '--only', '5.2', '--out', tmp_path)
    assert result.exit_code == 1 and result.output.count('not written') == 2 and '2 of 2 chapters failed: 05_experiments, 07_image_guidance' in result.output
    (tmp_path/'config.json').write_text(json.dumps({k: {} for k in ('clip', 'data', 'diffusion', 'decoder', 'translator', 'sampling')} | {'name': 'mine'}))
    result = shell('figures', '--folder', tmp_path, '--only', '5.2', '--out', tmp_path)
    assert result.exit_code == 1 and "no preset 'mine'" in result.output and '.toml' in result.output
    result = shell('figures', '--only', '9.9', '--out', tmp_path)
    assert result.exit_code == 1 and "no exhibit '9.9'" in result.output
