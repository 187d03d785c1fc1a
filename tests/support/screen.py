"""A terminal without a window: what is to be read on it after everything that was written to it."""

import re

_CONTROL = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")


def read_screen(written: str, width: int = 80) -> list[str]:
    """The lines of a terminal of ``width`` columns, scrolled ones too. It knows what rich sends to move and erase."""
    lines: list[list[str]] = [[]]
    row = column = at = 0
    while at < len(written):
        if control := _CONTROL.match(written, at):
            number = int(control[1]) if control[1].isdigit() else 1
            if control[2] == "A":
                row = max(0, row - number)
            elif control[2] == "K":
                lines[row] = [] if control[1] == "2" else lines[row][:column]
            at = control.end()
            continue
        character = written[at]
        at += 1
        if character == "\r":
            column = 0
        elif character == "\n":  # the terminal's driver adds the carriage return
            row, column = row + 1, 0
        else:
            if column == width:
                row, column = row + 1, 0
            lines += [[] for _ in range(row + 1 - len(lines))]
            lines[row] += " " * (column + 1 - len(lines[row]))
            lines[row][column] = character
            column += 1
        lines += [[] for _ in range(row + 1 - len(lines))]
    return ["".join(line).rstrip() for line in lines]
