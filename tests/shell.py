"The command `t2i`, run in the tests' own process."
import re

from typer.testing import CliRunner

from t2i.cli import app


def shell(*arguments): return CliRunner().invoke(app, list(map(str, arguments)))


def says(result, *words, alone=True):
    "The command failed with one sentence that has the words; `alone` if nothing was said before it, such as progress."
    assert result.exit_code == 1 and 'Traceback' not in result.output, result.output
    *before, sentence = [line for line in result.output.splitlines() if line.strip()]
    assert not (alone and before) and len(sentence) > 30 and not re.search(r'[.!] [A-Z]', sentence), result.output
    for word in words: assert str(word) in sentence, sentence
