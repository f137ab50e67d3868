"""Formulas as MathML, which browsers display without a script."""

import re
from xml.etree.ElementTree import tostring

from latex2mathml.converter import convert_to_element

# Longer or more deeply nested ones are shown as they are written. The converter takes up to 50
# microseconds for a character.
MAX_LENGTH = 1_000
MAX_NESTING = 40
# Characters in the tree are written as references.
REFERENCE = re.compile(r"&amp;(#x?[0-9A-Fa-f]{1,6};)")
TAGS = {
    *("math", "menclose", "mfrac", "mi", "mmultiscripts", "mn", "mo", "mover", "mpadded"),
    *("mphantom", "mprescripts", "mroot", "mrow", "ms", "mspace", "msqrt", "mstyle", "msub"),
    *("msubsup", "msup", "mtable", "mtd", "mtext", "mtr", "munder", "munderover", "none"),
}
ATTRIBUTES = {
    "math": {"display"},
    "menclose": {"notation"},
    "mfrac": {"linethickness", "displaystyle"},
    "mi": {"mathvariant"},
    "mn": {"mathvariant"},
    "mo": {
        *("accent", "fence", "form", "largeop", "lspace", "mathvariant", "maxsize", "minsize"),
        *("movablelimits", "rspace", "separator", "stretchy", "symmetric"),
    },
    "mover": {"accent"},
    "mpadded": {"depth", "height", "lspace", "voffset", "width"},
    "mspace": {"depth", "height", "linebreak", "width"},
    "mstyle": {"displaystyle", "mathcolor", "mathvariant", "scriptlevel"},
    "mtable": {
        "columnalign",
        "columnlines",
        "columnspacing",
        "displaystyle",
        "rowlines",
        "rowspacing",
    },
    "mtd": {"columnalign", "columnspan", "rowspan"},
    "mtext": {"mathvariant"},
    "munder": {"accentunder"},
}


def to_mathml(latex: str, *, display: bool) -> str | None:
    """Return MathML, not sanitised; None for a formula that cannot be converted."""
    if len(latex) > MAX_LENGTH or latex.count("{") + latex.count("\\left") > MAX_NESTING * 4:
        return None
    if _nesting(latex) > MAX_NESTING:
        return None
    try:
        element = convert_to_element(latex, display="block" if display else "inline")
    except Exception:
        # The converter raises errors of its own, and IndexError, ValueError, RecursionError and others
        # for LaTeX that it does not know.
        return None
    # Not by its own function, which unescapes "<" in the texts of a formula.
    return REFERENCE.sub(r"&\1", tostring(element, encoding="unicode"))


def _nesting(latex: str) -> int:
    depth = deepest = 0
    for brace in re.findall(r"\\.|[{}]", latex):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        deepest = max(deepest, depth)
    return deepest
