"""Rows to supervised tokens: `row -> Conversation -> Example -> batch`, with every problem said, every row counted."""

from trimtab.data.collate import collate
from trimtab.data.conversation import Conversation, conversations
from trimtab.data.encode import Example
from trimtab.data.ledger import Ledger
from trimtab.data.prepare import Prepared, prepare
from trimtab.data.problems import Problem, Problems
from trimtab.data.read import Row, Rows, read
from trimtab.data.render import Renderer
from trimtab.data.report import Report, check, print_example

__all__ = [
    "Conversation",
    "Example",
    "Ledger",
    "Prepared",
    "Problem",
    "Problems",
    "Renderer",
    "Report",
    "Row",
    "Rows",
    "check",
    "collate",
    "conversations",
    "prepare",
    "print_example",
    "read",
]
