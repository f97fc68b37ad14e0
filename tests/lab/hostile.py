"""Strings that do harm, or fail, where text is read as markup. In each field the same ones."""

FLAG = "window.hurt"
"""What a script among these strings sets, so that a test can see whether one ran."""
HOSTILE = [
    f"<script>{FLAG}=1</script>",
    f"<img src=x onerror={FLAG}=2>",
    f'"><svg onload={FLAG}=3>',
    f'<a href="javascript:{FLAG}=4">a</a>',
    f"[a](javascript:{FLAG}=5) ![b](https://example.org/b.png)",
    f"</script><script>{FLAG}=6</script>",
    f"` ```{{raw}} html\n<script>{FLAG}=7</script>\n```",
    "{glue:text}`no` {eval}`1` {{ 1 }} {% x %} <%x%>",
    r"$\pi$ is less than $4",
    "from $5% to $6%, $\\(x\\)$ $$y$$",
    "__init__ *a* **b** _c_ ~~d~~ ^e^ # f",
    "1. a\n2. b\n\n    code",
    "| a | b |\n|---|---|\n| c | d |",
    "<br><b>bold</b><sup>2</sup> &lt;i&gt; &amp;",
    "%{text} %{x} {y} %s %(name)s",
    "_begins with an underscore",
    "https://example.org/page www.example.org a@example.org",
    "é ß 中文 עברית \u202e reversed",
]
