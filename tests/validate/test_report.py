"""The report as a page: what comes from files is text in it, and nothing else."""

from pathlib import Path

from llmexport.export.exported import Export
from llmexport.export.spec import causal_lm
from llmexport.validate.report import Report, Rung, page

HOSTILE = "<script>x</script>\u202etxt\x1b[31m\n"


def test_a_hostile_name_is_shown_as_text() -> None:
    said = dict.fromkeys(("arch", "block", "dtype", "target", "opset"), HOSTILE)
    export = Export(
        folder=Path(),
        graphs=(),
        weights=(),
        config={},
        text_config={},
        renamed={},
        reference=causal_lm(HOSTILE),
        versions={HOSTILE: HOSTILE},
        notes=(),
        companions={},
        inode=0,
        **said,
    )
    shown = page(export, Report([Rung(HOSTILE, "not run", HOSTILE)], {HOSTILE: {"prefill": 1, "decode": 1}}, {}))
    assert "<script>" not in shown
    assert shown.count(r"&lt;script&gt;x&lt;/script&gt;\u202etxt\x1b[31m\n") == 12
    assert shown.replace("\n", "").isprintable()
