"""What the texts that a user reads may speak of: an installation has no checkout beside it."""

import ast
from pathlib import Path

import bdh

PACKAGE = Path(bdh.__file__).parent


def texts(path: Path) -> list[tuple[int, str]]:
    """Texts of a file, and their lines; not its docstrings, which are the code's."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone
    ]


def test_no_message_sends_its_reader_to_a_page_of_the_repository_or_to_an_index_that_has_no_bdh():
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}: {text}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, text in texts(path)
        if "docs/" in text or "pip install bdh" in text or ("pip install" in text and "bdh[" in text)
    ]
    assert wrong == []
