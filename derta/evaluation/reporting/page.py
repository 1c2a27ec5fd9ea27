"""The report's page: one file, no network, readable in light and dark."""

from __future__ import annotations

import jinja2

_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root {
  color-scheme: light dark;
  --ink: #24292f; --quiet: #636c76; --paper: #ffffff; --line: #d1d9e0; --bar: #0072b280;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --quiet: #9198a1; --paper: #11151a; --line: #343b44; --bar: #56a5d8a0; }
}
body {
  margin: 0 auto; max-width: 66rem; padding: 2.5rem 1.5rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
}
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .35rem; }
p { max-width: 46rem; margin: .35rem 0 .9rem; }
.quiet, figcaption, small { color: var(--quiet); }
figure { margin: 0 0 1rem; }
figcaption { font-size: .9rem; max-width: 46rem; }
figure svg {
  display: block; max-width: 100%; height: auto; margin-top: .9rem; overflow: visible;
}
@media (max-width: 40rem) { figure { overflow-x: auto; } figure svg { max-width: none; } }
.scroll { overflow-x: auto; }
.scroll + .scroll { margin-top: 1.4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .45rem .45rem .55rem; text-align: right; }
td, th:first-child, th.group { white-space: nowrap; }
th:first-child { text-align: left; }
thead th { font-weight: 600; font-size: .85rem; vertical-align: bottom; }
thead tr:first-child th { color: var(--quiet); font-weight: 500; padding-bottom: 0; }
thead tr:last-child { border-bottom: 1.5px solid var(--ink); }
tbody tr { border-bottom: 1px solid var(--line); }
tbody th { font-weight: 700; }
th small { font-weight: 400; }
td small { display: block; font-size: .72rem; line-height: 1.2; }
td.share {
  background: linear-gradient(var(--bar), var(--bar)) no-repeat left .45rem bottom .2rem;
  background-size: calc((100% - .9rem) * var(--share)) 3px;
}
thead th.group { text-align: left; border-bottom: 1px solid var(--line); }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; max-width: 46rem; }
details { margin: .4rem 0; }
summary { cursor: pointer; }
blockquote {
  margin: .3rem 0 1rem; padding-left: .9rem; border-left: 3px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere; max-width: 46rem;
}
mark { background: var(--line); color: inherit; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="quiet">{{ subtitle }}</p>

{% block content -%}
{{ table }}
{% for line in undecided %}<p>{{ line }}.</p>
{% endfor %}{% if table %}<p><small>Small figures: 95% Wilson intervals over all trials.
{% if seeds > 1 %}Rates are pooled over {{ seeds }} seeds, and intervals are widened where these
differ by more than chance.{% endif %}</small></p>
{% endif %}

{% if by_judge %}<h2>Judges side by side</h2>
<p class="quiet">Each judge reads the same answers. The figures at the top of the page are those of
the first judge.</p>
{{ by_judge }}
{% endif %}
{% if empty %}<h2>Empty answers</h2>
<p class="quiet">Share of the answers of each kind that are empty.</p>
{{ empty }}
{% endif %}
{% for figure in figures %}<h2>{{ figure.title }}</h2>
<figure role="img" aria-label="{{ figure.title }}">
<figcaption>{{ figure.caption }}</figcaption>
{{ figure.svg }}
</figure>
{% endfor %}
{% if notes %}<details><summary>Records left out, answers empty or undecided, forbidden
tokens</summary>
<ul>{% for note in notes %}
<li>{{ note }}</li>{% endfor %}
</ul></details>
{% endif %}
<h2>What the figures mean</h2>
<dl>{% for term, meaning in meanings %}
<dt>{{ term }}</dt><dd>{{ meaning }}</dd>{% endfor %}
</dl>
{% if samples %}<h2>Samples</h2>
{% for name, answers in samples %}<details><summary>{{ name }}: {{ answers | length }}</summary>
{% for sample in answers %}<p><small>{{ sample.metric }} · {{ sample.id }} ·
{{ "counted" if sample.counted else "not counted" }}</small></p>
<blockquote><b>{{ sample.request }}</b>
<mark>{{ sample.prefilled }}</mark>{{ sample.answer }}</blockquote>
{% endfor %}</details>
{% endfor %}{% endif %}
{%- endblock %}
</body>
</html>
"""

PAGE = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
).from_string(_TEMPLATE)
