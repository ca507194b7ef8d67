"""The parser: errors of one line, help by topic, `key=value` arguments."""
import argparse
import sys
import textwrap
from typing import Any, Dict, List, NoReturn, Optional

from timm.utils import ParseKwargs

from .per_teacher import StorePerTeacher, place_positionals

_WIDTH = 100


class ArgumentParser(argparse.ArgumentParser):
    """Parser of some 200 flags, for whom usage and help of all at once would bury what was asked for.

    Errors are one line. `--help` names the flags of each topic, `--help TOPIC` explains those of one.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(add_help=False, allow_abbrev=True, **kwargs)
        self.topics: Dict[str, Any] = {}  # groups of flags by the word that `--help` takes
        self.add_argument(
            '-h', '--help', nargs='?', const='', action=_HelpAction, default=argparse.SUPPRESS,
            metavar='TOPIC', help='list all flags, or explain those of a topic (all: of every topic)')

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        argv = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(place_positionals(argv, self._find_action), namespace)

    def _find_action(self, flag: str) -> Optional[argparse.Action]:
        """Return the action of a flag, which may be shortened; None where there is none, or several."""
        if not flag.startswith('--'):
            return None
        known = self._option_string_actions
        found = {id(known[name]): known[name] for name in known if name == flag} or {
            id(known[name]): known[name] for name in known if name.startswith(flag)}
        return next(iter(found.values())) if len(found) == 1 else None

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if isinstance(action, StorePerTeacher):
            return action.read(self, arg_string)
        return super()._get_value(action, arg_string)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if not isinstance(action, StorePerTeacher):  # which has done it
            super()._check_value(action, value)

    def add_topic(self, name: str, title: str, description: Optional[str] = None) -> Any:
        """Add a group of flags that `--help NAME` shows."""
        if name not in self.topics:
            self.topics[name] = self.add_argument_group(title, description)
        return self.topics[name]

    def format_overview(self) -> str:
        """Return what `--help` prints: every flag's name under its topic."""
        lines = [f'usage: {self.prog} [--data-dir DIR] [flags]', '', self.description or '', '']
        for name, group in self.topics.items():
            lines.append(f'{name}: {group.title}')
            lines += textwrap.wrap(
                ' '.join(_names(group)), _WIDTH, initial_indent='  ', subsequent_indent='  ',
                break_on_hyphens=False)
        lines += ['', f'{self.prog} -h TOPIC explains the flags of a topic, e.g. -h {next(iter(self.topics), "all")}; '
                      '-h all those of every topic.']
        return '\n'.join(lines) + '\n'

    def format_topic(self, name: str) -> str:
        """Return what `--help NAME` prints: the flags of one topic with their explanations."""
        formatter = self.formatter_class(prog=self.prog)
        group = self.topics[name]
        formatter.start_section(group.title)
        formatter.add_text(group.description)
        formatter.add_arguments(group._group_actions)
        formatter.end_section()
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message} (--help lists all flags)\n')


class _HelpAction(argparse.Action):
    def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option_string: Optional[str] = None,
    ) -> None:
        assert isinstance(parser, ArgumentParser)
        if values == 'all':
            print('\n'.join(parser.format_topic(name) for name in parser.topics))
        elif values in parser.topics:
            print(parser.format_topic(values))
        elif values:
            parser.error(f"no topic '{values}', there are: {', '.join(parser.topics)}, all")
        else:
            print(parser.format_overview())
        parser.exit()


def _names(group: Any) -> List[str]:
    """The longest name of each flag of a group."""
    return [
        max(action.option_strings, key=len) if not isinstance(action, argparse.BooleanOptionalAction)
        else action.option_strings[0] for action in group._group_actions if action.option_strings]


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
