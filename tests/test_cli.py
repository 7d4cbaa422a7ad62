"""The console command: what it loads, what it says, how it ends."""

import subprocess
import sys
import urllib.error

import pytest
from safetensors import SafetensorError

from dsmoe import cli
from dsmoe.errors import run_reporting_errors


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_subcommand_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"dsmoe {name}" in capsys.readouterr().out


def test_the_list_of_subcommands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out and command.summary.split()[0] in out for name, command in cli.COMMANDS.items())


@pytest.mark.parametrize("words", [["nonsense"], []])
def test_unknown_subcommands_end_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def loaded_by(code):
    """Names of the modules that a fresh interpreter has loaded after `code`."""
    code += "; import sys; print(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_script_does_not_load_torch_before_it_is_needed():
    code = "import sys; sys.argv = ['/usr/bin/dsmoe', '--help']; import dsmoe.cli"
    assert not loaded_by(code) & {"torch", "transformers"}


def test_importing_the_package_registers_the_architecture():
    code = "import dsmoe; from transformers import AutoConfig; AutoConfig.for_model('dsmoe'); dsmoe.DSMoEForCausalLM"
    assert "torch" in loaded_by(code)


def test_names_of_the_package():
    import dsmoe

    assert dsmoe.DSMoEConfig.model_type == "dsmoe"
    with pytest.raises(AttributeError, match="nonsense"):
        dsmoe.nonsense  # noqa: B018


def test_a_closed_pipe_is_no_error():
    """As in `dsmoe plan ... | head -1`: no traceback, whatever the reader left unread."""
    program = (
        "import sys; from dsmoe.errors import run_reporting_errors\n"
        "sys.exit(run_reporting_errors(lambda: print('x' * 10**6)))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


def raising(error):
    def function():
        raise error

    return function


def test_what_the_system_says_of_a_file_is_one_line(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for function, expected in (
        (lambda: (file / "sub").mkdir(), f"error: {file / 'sub'}: Not a directory"),
        ((tmp_path / "absent").read_text, f"error: {tmp_path / 'absent'}: No such file or directory"),
        # of a renaming the place that the user named
        (
            lambda: file.rename(tmp_path / "a" / "b"),
            f"error: {tmp_path / 'a' / 'b'}: No such file or directory",
        ),
    ):
        assert run_reporting_errors(function) == 2
        assert capsys.readouterr().err == f"{expected}\n"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        urllib.error.HTTPError("https://somewhere", 500, "broken", {}, None),
    ],
    ids=lambda error: type(error).__name__,
)
def test_without_a_file_it_stays_a_traceback(error):
    with pytest.raises(type(error)):
        run_reporting_errors(raising(error))


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(27, "File too large", "runs/x"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=str,
)
def test_a_full_disk_is_one_line(error, capsys):
    assert run_reporting_errors(raising(error)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "the disk is full" in line and "make room" in line
    assert ("runs/x" in line) == (getattr(error, "filename", None) is not None)


def test_an_output_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["plan", "--flops", "1e18", "--json", str(tmp_path / "file" / "x.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    place = tmp_path / "file"
    assert (
        line
        == f"error: --json {place / 'x.json'}: {place} is no folder that can be written to; name another place"
    )
