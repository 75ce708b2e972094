"""The page's style sheet."""

CSS = """
:root {
  --ink:#1d2733; --dim:#5b6875; --line:#dde3e8; --paper:#fff; --panel:#f5f7f9;
  --win:#15803d; --loss:#b91c1c; --accent:#c2410c
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink:#e4e8ec; --dim:#9aa6b2; --line:#333d47; --paper:#14191f; --panel:#1c232b;
    --win:#4ade80; --loss:#f87171; --accent:#fb923c
  }
}
* { box-sizing:border-box }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.5 system-ui, sans-serif }
main { max-width:62rem; margin:0 auto; padding:1.5rem 1rem 4rem }
h1 { font-size:2rem; line-height:1.15; margin:0 0 .6rem } h2 { font-size:1.25rem; margin:2.6rem 0 .6rem } h3 { font-size:1rem }
.kicker { color:var(--accent); font-weight:600; margin:0 } .lead { font-size:1.15rem; margin:.2rem 0 }
.dim { color:var(--dim); font-size:.86em }
.tiles { display:grid; grid-template-columns:repeat(auto-fit, minmax(13rem, 1fr)); gap:.8rem }
.tile { background:var(--panel); border-radius:.6rem; padding:.8rem 1rem; border-left:.3rem solid var(--win) }
.tile { display:flex; flex-direction:column }
.tile.loss { border-color:var(--loss) } .tile .figure { font-size:1.9rem; font-weight:650; line-height:1.2; color:var(--win) }
.tile.loss .figure { color:var(--loss) } .tile span:last-child { font-size:.86rem; overflow-wrap:anywhere }
details { margin-top:.8rem } summary { cursor:pointer }
.scroll { overflow-x:auto; -webkit-overflow-scrolling:touch }
table { border-collapse:collapse; font-size:.82rem; font-variant-numeric:tabular-nums; min-width:100% }
th, td { text-align:left; padding:.35rem .6rem; border-bottom:1px solid var(--line); vertical-align:top }
.number { white-space:nowrap }
tr.reference td:first-child, tr.planned td:first-child, tr.published td:first-child { min-width:12rem }
tr.fewer-steps td:first-child { min-width:12rem }
thead th { color:var(--dim); font-weight:600; line-height:1.2; vertical-align:bottom }
tr.group th { background:var(--panel); padding-top:.8rem } tr.reference td { font-weight:600 }
tr.planned td:first-child { color:var(--accent) }
tr.win td b { color:var(--win) } tr.loss td b { color:var(--loss) }
.facts th { white-space:nowrap; font-weight:600 } .facts code { overflow-wrap:anywhere }
figure { margin:1rem 0; overflow-x:auto } figure img { width:100%; min-width:34rem; height:auto }
figcaption { color:var(--dim); font-size:.86rem }
.paper { background:#fff; border-radius:.4rem; padding:.5rem; max-width:42rem }
.strip { display:grid; grid-template-columns:13rem 1fr; gap:.4rem 1rem; margin:.7rem 0; align-items:center; font-size:.9rem }
.pixels { display:block; width:100%; max-width:38rem; height:auto; image-rendering:pixelated }
.pixels { margin-bottom:3px; outline:1px solid var(--line) }
@media (max-width:40rem) { .strip { grid-template-columns:1fr } h1 { font-size:1.6rem } }
pre { white-space:pre-wrap; font-size:.8rem }
""".strip()
