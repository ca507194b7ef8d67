"""The parser, with errors of one line."""
import argparse
from typing import Any, NoReturn, Optional

from timm.utils import ParseKwargs


class ArgumentParser(argparse.ArgumentParser):
    """Parser whose errors are one line: the usage of some 150 flags would bury the message."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message} (--help lists all flags)\n')


class ParseKeyValues(ParseKwargs):
    """`key=value ...` into a dict as timm does it, but an item that is not `key=value` is named in the error."""

    def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option_string: Optional[str] = None,
    ) -> None:
        for item in values:
            key, sep, _ = item.partition('=')
            if item and not (key.strip() and sep):
                raise argparse.ArgumentError(self, f"'{item}' is not of the form key=value")
        super().__call__(parser, namespace, values, option_string)
