// The panel of one site or weight: its history, its histogram, its numbers at a sampled step.

function openPanel(kind, name, at = null) {
  state.panel = { kind, name, at, from: document.activeElement };
  const panel = $("panel");
  panel.replaceChildren();
  if (!panel.open) panel.showModal();
  drawPanel();
  panel.scrollTop = 0;
  $("panel-close").focus();
}

function closePanel() {
  if ($("panel").open) return; // it was opened again before the browser told that it was closed
  const from = state.panel?.from,
    name = state.panel?.name;
  state.panel = null;
  for (const plot of $("panel").querySelectorAll(".plot")) Plotly.purge(plot);
  $("panel").replaceChildren();
  if (from?.isConnected && from !== document.body) from.focus();
  else document.querySelector(`button[data-name="${CSS.escape(name ?? "")}"]`)?.focus();
}

function drawPanel() {
  if (!state.panel) return;
  const { kind, name } = state.panel,
    panel = $("panel"),
    isSite = kind === "site";
  const run = state.runs[isSite ? state.site.run : state.update.run],
    sampled = run.sites;
  const row = sampled ? sampled[isSite ? "names" : "weights"].indexOf(name) : -1;
  if (!panel.firstChild)
    panel.append(
      el(
        "div",
        { class: "panel-head" },
        el("h2", { id: "panel-title" }),
        el("button", { id: "panel-close", type: "button", onclick: () => panel.close() }),
      ),
      el("p", { class: "note", id: "panel-about" }),
      el("h3", { id: "panel-history-title" }),
      el("div", { class: "plot history", id: "panel-history", role: "img" }),
      el("div", { id: "panel-step" }),
    );
  $("panel-title").textContent = name;
  $("panel-close").textContent = t("close");
  $("panel-history-title").textContent = t("history");
  $("panel-history").setAttribute("aria-label", t("history"));
  drawHistory(kind, name);
  $("panel-about").textContent = row < 0 ? t("not_in_run") : several() ? t("of_run", { run: run.name }) : "";
  if (row < 0 || !isSite) {
    fill("panel-step");
    return;
  }
  const places = sampled.histogram_at;
  const wanted = state.panel.at ?? places[places.length - 1];
  const slot = places.reduce(
    (best, place, i) => (Math.abs(place - wanted) < Math.abs(places[best] - wanted) ? i : best),
    0,
  );
  if (!$("panel-slider"))
    fill(
      "panel-step",
      el("h3", { id: "panel-histogram-title" }),
      el(
        "div",
        { class: "slider" },
        el("label", { for: "panel-slider", id: "panel-slider-label" }),
        el("input", {
          type: "range",
          id: "panel-slider",
          min: 0,
          oninput: (event) => {
            state.panel.at = state.runs[state.site.run].sites.histogram_at[Number(event.target.value)];
            drawPanel();
          },
        }),
        el("output", { id: "panel-slider-value" }),
      ),
      el("div", { class: "plot", id: "panel-histogram", role: "img" }),
      el("p", { class: "note", id: "panel-range" }),
      el("div", { id: "panel-numbers" }),
    );
  $("panel-histogram-title").textContent = t("histogram");
  $("panel-slider-label").textContent = t("sampled_step");
  Object.assign($("panel-slider"), { max: places.length - 1, value: slot });
  $("panel-slider").setAttribute("aria-valuetext", t("step_n", { n: sampled.steps[places[slot]] }));
  $("panel-slider-value").textContent = count(sampled.steps[places[slot]]);
  drawHistogram(sampled, row, slot);
  drawNumbers(sampled, row, slot);
}

function drawHistory(kind, name) {
  const traces = [],
    keys = kind === "site" ? ["sqnr", "underflow", "overflow", "amax"] : ["ratio", "lost", "unseen"];
  const axes = kind === "site" ? { sqnr: 1, underflow: 2, overflow: 2, amax: 3 } : { ratio: 1, lost: 2, unseen: 2 };
  state.runs.forEach((run, index) => {
    const source = run.sites && (kind === "site" ? run.sites : run.sites.updates),
      row = run.sites ? run.sites[kind === "site" ? "names" : "weights"].indexOf(name) : -1;
    if (row < 0) return;
    keys.forEach((key, k) => {
      const axis = axes[key],
        tint = colour(several() ? index : k),
        isShare = axis === 2;
      const points = run.sites.steps
        .map((x, i) => [x, source[key][row][i]])
        .filter(([, y]) => known(y) && Number.isFinite(value(y)));
      if (!points.length) points.push([run.sites.steps[0], null]); // an axis without a point has no range
      traces.push({
        type: "scatter",
        mode: "lines+markers",
        name: plain(several() ? `${run.name} · ${t(key)}` : t(key)),
        x: points.map((p) => p[0]),
        y: points.map((p) => (p[1] == null ? null : value(p[1]))),
        yaxis: axis === 1 ? "y" : "y" + axis,
        line: {
          color: tint,
          width: 2,
          dash: several() ? (key === "overflow" || key === "unseen" ? "dot" : dash(index)) : dash(k),
        },
        marker: { size: 6, symbol: ["circle", "square", "diamond", "triangle-up"][k], color: tint },
        hovertemplate: `${t("step")} %{x:,}<br>%{y:${isShare ? ".3~p" : ".4~g"}}<extra>${plain(t(key))}</extra>`,
      });
    });
  });
  const grid = { gridcolor: css("--grid"), zerolinecolor: css("--grid"), automargin: true, nticks: 4 };
  const site = kind === "site";
  draw($("panel-history"), traces, {
    showlegend: true,
    uirevision: name,
    xaxis: { anchor: site ? "y3" : "y2" },
    yaxis: {
      ...grid,
      domain: site ? [0.7, 1] : [0.56, 1],
      title: { text: t(site ? "sqnr_axis" : "ratio_axis"), font: { size: 11 } },
      ...(site ? {} : { exponentformat: "power" }),
    },
    yaxis2: {
      ...grid,
      domain: site ? [0.36, 0.64] : [0, 0.44],
      tickformat: ".2~p",
      rangemode: "tozero",
      title: { text: t("share_axis"), font: { size: 11 } },
    },
    ...(site
      ? {
          yaxis3: {
            ...grid,
            domain: [0, 0.3],
            rangemode: "tozero",
            exponentformat: "power",
            title: { text: t("amax_axis"), font: { size: 11 } },
          },
        }
      : {}),
  });
}

function limits(sampled, row, at) {
  // log2 of smallest subnormal, smallest normal, largest; null where unknown
  const index = sampled.format[row][at],
    range = index == null ? null : sampled.formats[index].range;
  if (!range) return null;
  const top = value(sampled.amax[row][at]);
  if (range.scaled && !(top > 0)) return null;
  return {
    scaled: range.scaled,
    whole: range.whole,
    logs: range.values.map((one) => Math.log2(one) + (range.scaled ? Math.log2(top) : 0)),
  };
}

function drawHistogram(sampled, row, slot) {
  const at = sampled.histogram_at[slot],
    found = sampled.histograms[row][slot],
    range = limits(sampled, row, at);
  const format = sampled.formats[sampled.format[row][at]]?.name ?? "–",
    has = found && found[1].some((n) => n > 0);
  $("panel-histogram").hidden = !has;
  $("panel-histogram").setAttribute("aria-label", t("histogram"));
  const power = (x) =>
    Math.abs(x) < 17 && x > 0 ? figures(2 ** x, 5) : Number.isInteger(x) ? "2" + superscript(x) : figures(2 ** x, 3);
  $("panel-range").textContent =
    (has ? "" : t("no_histogram") + " ") +
    (range
      ? t(!range.scaled ? "range_plain" : range.whole ? "range_scaled" : "range_blocks", {
          format,
          low: power(range.logs[0]),
          normal: power(range.logs[1]),
          high: power(range.logs[2]),
        })
      : t("range_unknown", { format }));
  if (!has) return;
  const [first, counts] = found,
    total = counts.reduce((a, b) => a + b, 0);
  const place = (k) => (!range?.whole ? 0 : first + k + 1 <= range.logs[0] ? 1 : first + k >= range.logs[2] ? 2 : 0);
  const bars = [0, 1, 2]
    .map((kind) => {
      const ks = counts.map((_, k) => k).filter((k) => counts[k] > 0 && place(k) === kind);
      return {
        type: "bar",
        name: plain(t(["bin_inside", "bin_below", "bin_above"][kind])),
        x: ks.map((k) => first + k + 0.5),
        y: ks.map((k) => counts[k] / total),
        width: 1,
        text: ks.map((k) => `2${superscript(first + k)} ≤ |x| < 2${superscript(first + k + 1)}`),
        textposition: "none",
        hovertemplate: "%{text}<br>%{y:.3~p}<extra></extra>",
        marker: {
          color: colour(kind),
          line: { width: 1, color: css("--back") },
          pattern: { shape: ["", "/", "x"][kind] },
        },
      };
    })
    .filter((bar) => bar.x.length);
  let low = first - 1,
    high = first + counts.length + 1;
  const near = range ? range.logs.filter((x) => x > low - 12 && x < high + 12) : [];
  low = Math.min(low, ...near.map((x) => x - 1));
  high = Math.max(high, ...near.map((x) => x + 1));
  const step = Math.max(1, Math.ceil((high - low) / 12)),
    ticks = [];
  for (let e = Math.ceil(low); e <= high; e += step) ticks.push(e);
  const marks = range
    ? range.logs
        .map((x, i) => [x, t(["mark_subnormal", "mark_normal", "mark_max"][i]), i])
        .filter(([x]) => near.includes(x))
    : [];
  draw($("panel-histogram"), bars, {
    uirevision: state.panel.name,
    bargap: 0,
    barmode: "overlay",
    showlegend: bars.length > 1,
    margin: { l: 46, r: 12, t: bars.length > 1 ? 34 : 8, b: 40 },
    xaxis: {
      title: { text: t("magnitude") },
      tickvals: ticks,
      ticktext: ticks.map((e) => "2" + superscript(e)),
      range: [low, high],
    },
    yaxis: {
      type: "log",
      title: { text: t("share_of_values"), font: { size: 11 } },
      exponentformat: "power",
      dtick: 1,
    },
    shapes: marks.map(([x]) => ({
      type: "line",
      xref: "x",
      yref: "paper",
      x0: x,
      x1: x,
      y0: 0,
      y1: 1,
      line: { color: css("--text"), width: 1.5, dash: "dash" },
    })),
    annotations: marks.map(([x, text, i]) => ({
      xref: "x",
      yref: "paper",
      x,
      y: 1,
      yanchor: "top",
      yshift: -i * 14,
      showarrow: false,
      text: plain(text),
      xanchor: i === 2 ? "right" : "left",
      font: { size: 11, color: css("--text") },
      bgcolor: css("--card"),
    })),
  });
}

function drawNumbers(sampled, row, slot) {
  const at = sampled.histogram_at[slot],
    blocks = sampled.blocks[row][slot],
    name = sampled.names[row];
  const head = [[t("format")], [t("sqnr"), "n"], [t("underflow"), "n"], [t("overflow"), "n"], [t("amax"), "n"]];
  const rows = [
    [
      el("code", {}, sampled.formats[sampled.format[row][at]]?.name ?? "–"),
      ...[
        ["sqnr", decibel],
        ["underflow", share],
        ["overflow", share],
        ["amax", figures],
      ].map(([key, show]) => show(sampled[key][row][at])),
    ],
  ];
  for (const [policy, values] of Object.entries(sampled.whatif))
    if (values.sqnr[row][at] != null || values.underflow[row][at] != null)
      rows.push([
        el("span", {}, t("what_if", { policy }) + ": ", el("code", {}, values.format[row] ?? "–")),
        decibel(values.sqnr[row][at]),
        share(values.underflow[row][at]),
        share(values.overflow[row][at]),
        figures(values.amax[row][at]),
      ]);
  const found = sampled.findings.filter((one) => one.site === name && one.step === sampled.steps[at]);
  fill(
    "panel-numbers",
    el("div", { class: "scroll table" }, grid(head, rows)),
    note(
      t("elements", {
        count: count(sampled.count[row][at]),
        zeros: count(sampled.zeros[row][at]),
        nonfinite: count(sampled.nonfinite[row][at]),
        policy: sampled.policies[at],
      }),
    ),
    blocks
      ? note(
          t("blocks", {
            count: count(blocks.count),
            zero: count(blocks.zero),
            lossy: share(blocks.lossy),
            worst: decibel(blocks.sqnr[0]),
            median: decibel(blocks.sqnr[1]),
            best: decibel(blocks.sqnr[2]),
          }),
        )
      : null,
    found.map((one) => el("p", {}, `${one.kind}: ${one.text}`)),
    blocks?.amax
      ? [
          el("h3", {}, t("blocks_amax")),
          el("div", { class: "plot", id: "panel-blocks", role: "img", "aria-label": t("blocks_amax") }),
        ]
      : null,
  );
  if (!blocks?.amax) return;
  const [first, counts] = blocks.amax;
  const every = Math.max(1, Math.ceil(counts.length / 12)),
    ticks = counts.map((_, k) => first + k).filter((_, k) => k % every === 0);
  draw(
    $("panel-blocks"),
    [
      {
        type: "bar",
        x: counts.map((_, k) => first + k + 0.5),
        y: counts,
        width: 1,
        marker: { color: colour(3) },
        text: counts.map((_, k) => `2${superscript(first + k)}`),
        textposition: "none",
        hovertemplate: "%{text}: %{y:,}<extra></extra>",
      },
    ],
    {
      bargap: 0,
      xaxis: { title: { text: t("magnitude") }, tickvals: ticks, ticktext: ticks.map((e) => "2" + superscript(e)) },
      yaxis: { title: { text: t("blocks_axis"), font: { size: 11 } } },
    },
  );
}
