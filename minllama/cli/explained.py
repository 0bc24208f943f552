"""Show an explanation in a terminal: the text with colored words, and the strongest words.

`minllama classify --explain` calls it.
"""

from typing import TYPE_CHECKING

from minllama.text import cut, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from minllama.classification.explain import Explanation, TargetEffects

MOST_LISTED = 10
MOST_TARGETS = 5
MIN_STRENGTH = 0.1  # of the largest effect; weaker words have no color
# Backgrounds of words in black, weak to strong: blue for the label, orange against it. The two are
# distinguishable with the common kinds of color blindness.
FOR = ("#bcd7fb", "#82b4f6", "#4a93f0")
AGAINST = ("#ffdcae", "#ffba6b", "#ff962b")
FOR_OF_16, AGAINST_OF_16 = ("bright_cyan",), ("bright_yellow",)  # for terminals of 16 colors

_SHADES = {
    (False, True): FOR,
    (False, False): AGAINST,
    (True, True): FOR_OF_16,
    (True, False): AGAINST_OF_16,
}


def print_explanation(
    explanation: "Explanation", predicted: list[str], *, console: "Console | None" = None
) -> None:
    """Print the words of a text by their effects.

    Args:
        explanation: of the text.
        predicted: the labels to show; without any, that with the largest value.
        console: for the output; None for standard output.
    """
    from rich.console import Console

    console = console or Console(highlight=False)
    targets = explanation.targets
    chosen = [i for i, target in enumerate(targets) if target.label in predicted]
    if not chosen:
        chosen = [max(range(len(targets)), key=lambda i: targets[i].value)]
    has_color = console.is_terminal and console.color_system is not None and not console.no_color
    for i in chosen[:MOST_TARGETS]:
        _print_target(explanation, i, console, has_color=has_color)


def grouped_notice(explanation: "Explanation") -> str | None:
    """A message about words that were left out together; None without any."""
    if not explanation.is_grouped:
        return None
    return (
        f"explanation: {explanation.n_words:,} words in {len(explanation.spans):,} groups; "
        "--max-words changes that"
    )


def _print_target(
    explanation: "Explanation", number: int, console: "Console", *, has_color: bool
) -> None:
    target = explanation.targets[number]
    strongest = explanation.strongest(MOST_LISTED, number)
    what = "the value" if explanation.unit == "value" else f"p({printable(target.label)})"
    console.print(_plain(f"{what} minus that without each word:", "dim"))
    if has_color:
        console.print(_colored(explanation, target, console.color_system == "standard"))
    for i in strongest:
        effect = f"{target.effects[i]:+.3f}" if explanation.unit == "probability" else ""
        effect = effect or f"{target.effects[i]:+.4g}"
        word = printable(cut(explanation.words[i], 60))
        console.print(_plain(f"  {effect}  {word}"), soft_wrap=True)
    if not strongest:
        console.print(_plain("  no word changes it"))


def _colored(explanation: "Explanation", target: "TargetEffects", of_16: bool) -> "Text":
    text = _plain(printable(explanation.text))
    largest = max((abs(effect or 0.0) for effect in target.effects), default=0.0)
    for (start, end), effect in zip(explanation.spans, target.effects, strict=True):
        strength = abs(effect or 0.0) / largest if largest else 0.0
        if effect and strength >= MIN_STRENGTH:
            shades = _SHADES[of_16, effect > 0]
            shade = shades[min(len(shades) - 1, int(strength * len(shades)))]
            text.stylize(f"black on {shade}", start, end)
    return text


def _plain(text: str, style: str = "") -> "Text":
    from rich.text import Text

    return Text(text, style)
