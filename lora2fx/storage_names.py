"""Names of modules in a PEFT config: keys that PEFT reads as regular expressions, here as the literal names they are.

An expression from a stranger's file is never run: one can take hours to fail.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora2fx.errors import FormatError

_SPECIAL = set("*+?()[]{}|^$\\")


@dataclass(frozen=True)
class NamePattern:
    """A dotted suffix, character by character; None is any one character, as which an unescaped dot is read."""

    characters: tuple[str | None, ...]
    whole: bool

    def fits(self, path: str) -> bool:
        """Whether PEFT's `re.match(r"(.*\\.)?(key)$", path)` would."""
        start = len(path) - len(self.characters)
        if start < 0 or not all(own in (None, there) for own, there in zip(self.characters, path[start:], strict=True)):
            return False
        return start == 0 or (not self.whole and path[start - 1] == ".")


def parse_pattern(where: str, key: str) -> NamePattern:
    """The key as a name, "^" in front of a full one. Raises `FormatError` for any other regular expression."""
    text, characters, escaped = key.removeprefix("^").removesuffix("$"), list[str | None](), False
    for character in text:
        if escaped and character.isalnum():
            break  # \d, \w, ...
        if not escaped and character == "\\":
            escaped = True
            continue
        if not escaped and character in _SPECIAL:
            break
        characters.append(None if character == "." and not escaped else character)
        escaped = False
    else:
        if characters and not escaped and key.isprintable():
            return NamePattern(tuple(characters), key.startswith("^"))
    raise FormatError(
        f"adapter_config.json: {where} has the key {key[:60]!r}, a regular expression. lora2fx runs none from a file:"
        " write the modules' names there."
    )
