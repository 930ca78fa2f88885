"""The chapter on experiments from a foreign working directory, as papermill runs it."""
import subprocess
import sys

import pandas as pd


def test_experiments(repository, tmp_path):
    out, elsewhere = tmp_path/'figures', tmp_path/'elsewhere'
    elsewhere.mkdir()
    done = subprocess.run([sys.executable, '-m', 'papermill', str(repository/'nbs/05_experiments.ipynb'), str(tmp_path/'executed.ipynb'),
                           '-p', 'preset', 'smoke', '-p', 'out_dir', str(out), '--no-progress-bar'], cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tables = list(out.rglob('table_5_1.csv'))
    assert len(tables) == 1 and tables[0].with_suffix('.md').is_file()
    table = pd.read_csv(tables[0])
    assert len(table) >= 4 and table.notna().any().all()  # three variants, and real pictures against real ones
    assert list(out.rglob('fig_5_2_*.png')) and not list(elsewhere.iterdir())
