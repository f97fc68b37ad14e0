"""The panel of notebook 12: type a question in JupyterLab, and see what the model makes of it.

It is made of ipywidgets, which work in JupyterLab alone. A page of the book has no kernel and shows
recorded examples instead.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import ipywidgets
import plotly.graph_objects as go
from IPython.display import HTML, display
from plotly.io.base_renderers import PlotlyRenderer

from dlk_utils.errors import DlkError
from dlk_utils.lab.escaping import html_text, without_folders
from dlk_utils.lab.figures import CONFIG, belief_figure, lines_figure
from dlk_utils.lab.table_display import show_table
from dlk_utils.lab.tables.explore import TEMPLATES, Asked, Explorer, shown_beliefs

WIDE = ipywidgets.Layout(width="95%")


class QuestionPanel:
    """Fields for a question, and below them what the model says and believes of it.

    It asks when the button is pressed, and when a field is left or chosen. `widget` is what a
    notebook displays.

    Parameters
    ----------
    explorer
        What asks.
    claims, system_prompts
        What the fields begin with, and the system prompts to choose from.
    """

    def __init__(self, explorer: Explorer, claims: Sequence[str], system_prompts: Sequence[str]):
        self.explorer = explorer
        self.kind = ipywidgets.ToggleButtons(options=list(TEMPLATES), description="A")
        self.text = ipywidgets.Textarea(claims[0], description="Text", rows=2, layout=WIDE)
        self.choice = ipywidgets.Dropdown(
            options=list(dict.fromkeys(system_prompts)), description="Told", layout=WIDE
        )
        self.system_prompt = ipywidgets.Textarea(
            system_prompts[0], description="or write", rows=2, layout=WIDE
        )
        self.layer = ipywidgets.SelectionSlider(
            options=list(explorer.detectors) or [0],
            value=explorer.layer if explorer.detectors else 0,
            description="Layer",
            disabled=not explorer.detectors,
        )
        self.button = ipywidgets.Button(description="Ask", button_style="primary")
        self.more = ipywidgets.Checkbox(
            bool(explorer.detectors),
            description="pictures, neighbours and changes",
            disabled=not explorer.detectors,
            layout=WIDE,
        )
        self.output = ipywidgets.Output()
        for field in (self.text, self.system_prompt):
            field.continuous_update = False
        self.layer.continuous_update = False
        self.choice.observe(self._take_choice, "value")
        for field in (self.kind, self.text, self.system_prompt, self.layer, self.more):
            field.observe(self.ask, "value")
        self.button.on_click(self.ask)
        fields = [self.kind, self.text, self.choice, self.system_prompt, self.layer, self.more]
        self.widget = ipywidgets.VBox([*fields, self.button, self.output])

    def _take_choice(self, change: Any) -> None:
        self.system_prompt.value = change["new"]

    def ask(self, *_: Any) -> None:
        """Ask what the fields hold, and show the answer."""
        with self._replaced_output():
            asked = self.explorer.ask(
                self.text.value, self.system_prompt.value, kind=self.kind.value
            )
            layer = self.layer.value if self.explorer.detectors else None
            display(HTML(verdict_html(self.explorer, asked, layer)))
            if layer is not None and self.more.value:
                _show_more(self.explorer, asked, layer)

    @contextlib.contextmanager
    def _replaced_output(self) -> Iterator[None]:
        """Show what is displayed within it in place of the last answer, an error as its message."""
        self.output.clear_output(wait=True)
        with self.output:
            try:
                yield
            except DlkError as error:
                message = html_text(without_folders(str(error)))
                display(HTML(f'<p class="refused">{message}</p>'))


def verdict_html(explorer: Explorer, asked: Asked, layer: int | None) -> str:
    """Say in HTML what was asked, what the model says and believes, and the verdict."""
    judged = explorer.judge(asked, layer)
    question = f"{html_text(judged.text)}<br><i>{html_text(judged.system_prompt)}</i>"
    answer = f"It says <b>{html_text(judged.says)}</b> (margin {judged.margin:+.1f})"
    if "verdict" in judged:
        rest = (
            f"It believes <b>{html_text(judged.believes)}</b> (belief {judged.belief:+.1f} at "
            f"layer {layer}). Verdict: <b>{html_text(judged.verdict)}</b>."
        )
    else:
        rest = f"No verdict: {html_text(explorer.why_none)}"
    return f'<div class="asked"><p>{question}</p><p class="verdict">{answer}. {rest}</p></div>'


def layers_figure(asked: Asked) -> go.Figure:
    """Draw the belief at the last token over the layers."""
    return lines_figure(
        asked.belief_by_layer(),
        x="layer",
        y="score",
        title="Belief over layers, where the answer begins",
        xlabel="layer",
        ylabel="belief (above 0: choice 1 is right)",
        reference=0,
    )


def tokens_figure(asked: Asked) -> go.Figure:
    """Draw the belief over layers and tokens, from the question on."""
    return belief_figure(shown_beliefs(asked), title="Belief over layers and tokens")


def _show_more(explorer: Explorer, asked: Asked, layer: int) -> None:
    for figure in (layers_figure(asked), tokens_figure(asked)):
        # Without the still picture of a page, which takes longer than the question.
        display(PlotlyRenderer(config=CONFIG).to_mimebundle(figure.to_dict()), raw=True)
    display(
        show_table(explorer.nearest(asked, layer), f"The nearest known examples, layer {layer}")
    )
    display(show_table(explorer.changes(asked, layer), "What a change at the last token does"))
