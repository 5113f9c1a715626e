"""Lines per folder, and whatever has grown beyond what a reader likes: files over 400 lines, functions over 70."""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
LONG_FILE = 400
LONG_FUNCTION = 70
MANY_PARAMETERS = 7


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def main() -> None:
    lines: Counter[str] = Counter()
    grown = []
    for path in sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("tools/*.py")]):
        text = path.read_text()
        relative = path.relative_to(ROOT)
        lines[str(relative.parent)] += text.count("\n")
        if text.count("\n") > LONG_FILE:
            grown.append(f"{relative}: {text.count(chr(10))} lines")
        if relative.parts[0] == "tests":
            continue
        for node in functions(ast.parse(text)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            parameters = len(node.args.args) + len(node.args.kwonlyargs)
            if length > LONG_FUNCTION or parameters > MANY_PARAMETERS + 1:
                grown.append(f"{relative}:{node.lineno} {node.name}: {length} lines, {parameters} parameters")
    for folder, count in sorted(lines.items()):
        print(f"{count:6}  {folder}")
    print(f"{sum(lines.values()):6}  in all")
    print("\n".join(["grown large:", *grown]) if grown else "nothing has grown large")


if __name__ == "__main__":
    main()
