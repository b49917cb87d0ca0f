"""What every script's command line shares: one-line errors, exit statuses, files written whole."""

import argparse
import dataclasses
import errno
import json
import os
import stat
import sys
import tempfile
from pathlib import Path


LONGEST_NAME = 255  # bytes, of the usual file systems
FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # what a file system says that has no room


class UserError(Exception):
    """A mistake that the user can mend. The message is one sentence: what is wrong and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are one line on stderr and exit status 2, like every other user error."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def add_options(parser, config, **help):
    """Give the parser an option for each field of the dataclass `config`, with its default; `help` explains some."""
    group = parser.add_argument_group(config.__name__)
    for field in dataclasses.fields(config):
        flag, text = f"--{field.name}", help.get(field.name, " ")
        if isinstance(field.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        elif isinstance(field.default, tuple):
            group.add_argument(flag, nargs="*", default=field.default, help=text)
        else:
            group.add_argument(flag, type=type(field.default), default=field.default, help=text)


def take_options(arguments, config):
    """The dataclass `config` from parsed arguments that add_options declared."""
    return config(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(config)})


def with_config(arguments):
    """Command-line arguments with `--config FILE` replaced by the options that the YAML file names, which come first."""
    finder = ArgumentParser(add_help=False)
    finder.add_argument("--config")
    found, rest = finder.parse_known_args(arguments)
    if found.config is None:
        return rest
    import yaml

    try:
        options = yaml.safe_load(Path(found.config).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"cannot read the config {found.config}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the config {found.config} is not YAML: {error}") from None
    if not isinstance(options, dict) or "config" in options:
        raise UserError(f"the config {found.config} is not a list of `option: value`")
    read = []
    for name, value in options.items():
        if isinstance(value, bool):
            read.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            read += [f"--{name}", *map(str, value)]
        else:
            read.append(f"--{name}={'' if value is None else value}")
    return read + rest


def printable(text):
    """The text with an escape for each character that a terminal would act on, or cannot show."""
    return "".join(character if character.isprintable() else character.encode("unicode_escape", "backslashreplace").decode()
                   for character in text)


def run(main):
    """Call `main()` and exit: with its status, or with 2 and one line on stderr after a UserError.

    Anything else is unexpected: Python prints the traceback and exits with 1.
    """
    try:
        status = main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        status = 130  # as a shell reports it
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = f" for {printable(str(error.filename))}" if error.filename else ""
        print(f"{Path(sys.argv[0]).name}: {error.strerror}{where}", file=sys.stderr)
        status = 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which not every script imports
            raise
        print(f"{Path(sys.argv[0]).name}: the GPU has no room for so much at a time: lower --batch_size, or for training raise "
              "--accumulation", file=sys.stderr)
        status = 1
    sys.exit(status or 0)


def check_writable(path):
    """Raise UserError unless a file can be created or replaced at `path`. Touches nothing.

    Permission bits are read directly as well, because for root os.access grants everything.
    """
    path = Path(path)
    folder = path.parent
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise UserError(f"cannot write {path.name[:40]}…: its name has {len(os.fsencode(path.name))} bytes, more than {LONGEST_NAME}")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder, name a file")
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is not an ordinary file, name one")
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: the folder {folder} does not exist, create it first")
    for place in [path, folder] if path.exists() else [folder]:
        mode = place.stat().st_mode
        if not os.access(place, os.W_OK) or not mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
            raise UserError(f"cannot write {path}: {place} is read-only")


def check_output(path, kind, reads=()):
    """`check_writable`, and that nothing is lost that is not meant to be.

    Args:
        kind: what will be written, of KINDS. Raises UserError where a file is there that is not of that kind.
        reads: paths of what is read, None among them left out. Raises UserError where `path` is one of them.
    """
    check_writable(path)
    if not Path(path).exists():
        return
    for source in filter(None, reads):
        if os.path.exists(source) and os.path.samefile(path, source):
            raise UserError(f"{path} would be written over {source}, which is read: name another file")
    content = Path(path).read_bytes()
    if content and not KINDS[kind](content):
        raise UserError(f"{path} is there already and is no {kind} file, which would be written over it: name another file")


def is_json(content):
    try:
        json.loads(content)
        return True
    except (ValueError, RecursionError):
        return False


def is_text(content):
    try:
        return "\0" not in content.decode("utf-8")
    except UnicodeDecodeError:
        return False


# How the files begin, or are, that scripts write.
KINDS = {"JSON": is_json, "CSV": is_text, "PNG": lambda content: content.startswith(b"\x89PNG"),
         "JPEG": lambda content: content.startswith(b"\xff\xd8"), "PDF": lambda content: content.startswith(b"%PDF"),
         "SVG": lambda content: is_text(content) and b"<svg" in content}
SUFFIX_KINDS = {".json": "JSON", ".csv": "CSV", ".png": "PNG", ".jpg": "JPEG", ".pdf": "PDF", ".svg": "SVG"}


def write_whole(path, data):
    """Write `data` (bytes) to `path` so that a reader, or a killed run, never meets half a file."""
    path = Path(os.path.realpath(path))  # a link stays a link
    check_writable(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        make_ordinary(temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def make_ordinary(*paths):
    """Give files that were made private, as mkstemp and safetensors make them, the permissions of an ordinary open()."""
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        os.chmod(path, 0o666 & ~umask)


def write_json(path, value):
    """Write `value` to `path` as UTF-8 JSON, whole or not at all."""
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    # A file name that is not UTF-8 comes as lone surrogates, for which JSON's escape and Python's are the same.
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def read_json(path, what):
    """Read the JSON file `path`; `what` names it in the one-line errors ("captions file")."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(f"the {what} {path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"the {what} {path} is nested too deep") from None
    except ValueError as error:
        raise UserError(f"the {what} {path} is not JSON: {error}") from None


def read_lines(path, what="text file"):
    """The lines of a UTF-8 text file; `what` names it in the one-line errors."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the {what} {path} is not UTF-8") from None


def is_file(path):
    """Whether an ordinary file is at `path`; False too where the file system does not let one ask, or the name is too long."""
    try:
        return Path(path).is_file()
    except OSError:
        return False
