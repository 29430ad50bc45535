"""Tables are the same plain text wherever they are printed."""

import pytest

from qkernels import tables


def made() -> list[str]:
    return tables.text("a title", ("layer", "size"), [("one", tables.size(1000))]).splitlines()


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_no_escapes_where_colour_is_forced(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    # Jupyter's kernel forces colour, and so do many CI services.
    plain = made()
    monkeypatch.setenv(variable, "1")
    assert made() == plain
    assert not any("\x1b" in line for line in plain)


def test_a_notebook_gets_the_text_and_no_display(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import rich.console

    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    lines = made()
    assert lines[0] == "a title"
    assert any("one" in line and "1.0 kB" in line for line in lines)
    assert capsys.readouterr().out == ""
