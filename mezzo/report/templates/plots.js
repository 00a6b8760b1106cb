// The curves over the steps of training.

const touch = () => matchMedia("(pointer: coarse)").matches;

function layout(more = {}) {
  const axis = { gridcolor: css("--grid"), zerolinecolor: css("--grid"), linecolor: css("--line"), automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    uirevision: "keep",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--text") },
    margin: { l: 46, r: 12, t: 8, b: 40 },
    dragmode: touch() ? false : "zoom",
    hovermode: "closest",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text"), size: 12 } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
    showlegend: false,
    ...more,
    xaxis: { ...axis, title: { text: t("step"), standoff: 6 }, ...more.xaxis },
    yaxis: { ...axis, ...more.yaxis },
  };
}

function settings() {
  return {
    responsive: true,
    displaylogo: false,
    showTips: false,
    scrollZoom: false,
    locale: state.lang === "zh" ? "zh-CN" : "en-US",
    locales: {
      "zh-CN": {
        dictionary: {
          "Download plot as a PNG": t("bar_png"),
          "Download plot": t("bar_png"),
          "Reset axes": t("bar_reset"),
        },
      },
    },
    displayModeBar: touch() ? false : "hover",
    modeBarButtons: [["toImage", "resetScale2d"]],
  };
}

function draw(div, traces, more) {
  return Plotly.react(div, traces, layout(more), settings());
}

// One card with a heading and a plot; kept between redraws, so that a zoom stays.
function card(parent, id, title, wide = false) {
  let box = $(id);
  if (!box) {
    box = el(
      "div",
      { class: "card" + (wide ? " wide" : ""), id },
      el("h3"),
      el("div", { class: "plot", role: "img" }),
      el("div", { class: "note" }),
    );
    parent.append(box);
  }
  box.firstChild.textContent = title;
  box.children[1].setAttribute("aria-label", title);
  return {
    div: box.children[1],
    say: (text) => {
      box.children[2].textContent = text;
    },
    box,
  };
}

function line(index, name, points, more = {}) {
  return {
    type: "scatter",
    mode: points.x.length === 1 ? "markers" : "lines",
    x: points.x,
    y: points.y.map(value),
    name: plain(name),
    line: { color: colour(index), width: 2, dash: dash(index) },
    marker: { color: colour(index) },
    hovertemplate: `%{y:.5~g}<br>${t("step")} %{x:,}<extra>${plain(name)}</extra>`,
    ...more,
  };
}

// Phases: shaded for one run, lines in the runs' colours for several.
function phaseMarks() {
  const shapes = [],
    annotations = [];
  state.runs.forEach((run, index) =>
    run.phases.forEach((phase, number) => {
      if (!several()) {
        if (number % 2)
          shapes.push({
            type: "rect",
            xref: "x",
            yref: "paper",
            layer: "below",
            line: { width: 0 },
            x0: phase.begin - 0.5,
            x1: phase.end + 0.5,
            y0: 0,
            y1: 1,
            fillcolor: css("--shade"),
          });
        if (run.phases.length > 1)
          annotations.push({
            xref: "x",
            yref: "paper",
            yanchor: "top",
            y: 1,
            xanchor: "left",
            showarrow: false,
            x: phase.begin,
            text: plain(t("phase_n", { n: phase.phase })),
            font: { size: 10, color: css("--soft") },
          });
      }
      if (number)
        shapes.push({
          type: "line",
          xref: "x",
          yref: "paper",
          x0: phase.begin - 0.5,
          x1: phase.begin - 0.5,
          y0: 0,
          y1: 1,
          line: { color: several() ? colour(index) : css("--soft"), width: 1, dash: "dot" },
        });
    }),
  );
  return { shapes, annotations };
}

function near(points, step) {
  // the y of the point closest to a step
  let best = null,
    distance = Infinity;
  points.x.forEach((x, i) => {
    if (Math.abs(x - step) < distance) {
      distance = Math.abs(x - step);
      best = value(points.y[i]);
    }
  });
  return best;
}

function lossTraces(run, index) {
  const name = (kind) => (several() ? `${run.name} · ${t(kind)}` : t(kind)),
    other = several() ? index : null;
  const traces = [],
    raw = run.curves.loss,
    tint = (alone) => colour(other ?? alone);
  traces.push(
    line(index, name("train_loss"), raw, {
      opacity: 0.3,
      showlegend: !several(),
      line: { color: tint(0), width: 1 },
      marker: { color: tint(0) },
    }),
  );
  traces.push(
    line(index, several() ? run.name : t("train_smoothed"), run.curves.smoothed, {
      line: { color: tint(0), width: 2.5, dash: dash(index) },
      marker: { color: tint(0) },
    }),
  );
  for (const [key, kind, symbol, style, alone] of [
    ["val_loss", "held_out", "circle", "solid", 1],
    ["val_loss_fp32", "held_out_fp32", "diamond-open", "dot", 2],
  ]) {
    const points = run.evaluated[key];
    if (points.x.length)
      traces.push(
        line(index, name(kind), points, {
          mode: "lines+markers",
          line: { color: tint(alone), width: 1.5, dash: style },
          marker: { color: tint(alone), symbol, size: 8 },
          showlegend: !several() || key === "val_loss", // with several runs the legend would outgrow the plot
        }),
      );
  }
  const marked = run.incidents.shown.filter((one) => near(raw, one.step) != null);
  if (marked.length)
    traces.push({
      type: "scatter",
      mode: "markers",
      name: plain(name("incidents")),
      x: marked.map((one) => one.step),
      y: marked.map((one) => near(raw, one.step)),
      customdata: marked.map(incidentKey),
      text: marked.map((one) => short(one.what || one.kind || "", 90)),
      meta: index,
      hovertemplate: `${t("step")} %{x:,}<br>%{text}<extra>${t("incident")}</extra>`,
      marker: { symbol: "triangle-down", size: 12, color: css("--bad"), line: { color: css("--back"), width: 1 } },
    });
  return traces;
}

function skippedTrace(run, index) {
  return {
    type: "scatter",
    mode: "markers",
    name: plain(several() ? `${run.name} · ${t("skipped")}` : t("skipped")),
    x: run.skipped.map((one) => one[0]),
    y: run.skipped.map((one) => value(one[1])),
    text: run.skipped.map((one) => short(one[2] || "", 70)),
    hovertemplate: `${t("step")} %{x:,}<br>${t("scale")} %{y}<br>%{text}<extra>${t("skipped")}</extra>`,
    marker: {
      symbol: "x",
      size: 8,
      color: several() ? colour(index) : css("--bad"),
      line: { width: 1, color: css("--back") },
    },
  };
}

const STEADY = ["lr", "loss_scale", "memory", "sparsity"],
  OPTIONAL = ["sparsity"];
const CURVES = [
  ["lr", "learning_rate", { tickformat: ".2~e", rangemode: "tozero" }],
  ["loss_scale", "loss_scale", { type: "log" }],
  ["grad_norm", "grad_norm", { type: "log" }],
  ["tokens_per_s", "tokens_per_s", { rangemode: "tozero", tickformat: ".3~s" }],
  ["mfu", "mfu", { tickformat: ".0%", rangemode: "tozero" }],
  ["memory", "memory", { rangemode: "tozero", ticksuffix: " MiB" }],
  ["sparsity", "sparsity", { rangemode: "tozero", tickformat: ".0%" }],
];

// Smallest and largest of the values above zero; not by Math.min(...), which cannot take very many.
function span(values) {
  return values.reduce(
    ([low, high], v) => (v > 0 ? [Math.min(low, v), Math.max(high, v)] : [low, high]),
    [Infinity, 0],
  );
}

function logTicks(key, values) {
  const [low, high] = span(values);
  if (key === "grad_norm") return high > 100 * low ? { dtick: 1 } : high > 5 * low ? { dtick: "D2" } : {};
  if (key !== "loss_scale" || !high) return {};
  const first = Math.floor(Math.log2(low)),
    last = Math.ceil(Math.log2(high));
  const tickvals = [];
  for (let e = first; e <= last; e += Math.max(1, Math.ceil((last - first) / 6))) tickvals.push(2 ** e);
  return { tickvals, ticktext: tickvals.map((v) => (v >= 1 && v < 1e5 ? count(v) : "2" + superscript(Math.log2(v)))) };
}

function drawCurves() {
  const parent = $("curves-body"),
    runs = state.runs,
    marks = phaseMarks();
  const empty = runs.every((run) => !run.records),
    xaxis = { rangemode: "tozero" };
  const box = card(parent, "plot-loss", t("losses"), true);
  const told = runs
    .filter((run) => run.nonfinite.length)
    .map(
      (run) =>
        (several() ? run.name + ": " : "") +
        t("nonfinite_loss", {
          n: count(run.nonfinite.length),
          steps: run.nonfinite.slice(0, 8).join(", ") + (run.nonfinite.length > 8 ? ", …" : ""),
        }),
    );
  for (const run of runs.filter((one) => one.phases.length > 1))
    told.push(
      (several() ? run.name + ": " : "") +
        run.phases
          .map((phase) =>
            t("phase_span", {
              n: phase.phase,
              begin: count(phase.begin),
              end: count(phase.end),
              why: phase.ended_by ? t("phase_ended", { why: phase.ended_by }) : "",
            }),
          )
          .join(" "),
    );
  if (runs.some((run) => run.thinned)) told.push(t("thinned"));
  if (!empty && runs.every((run) => !run.evaluated.val_loss.x.length && !run.evaluated.val_loss_fp32.x.length))
    told.push(t("no_evaluation"));
  box.say(empty ? t("no_records") : told.join(" "));
  draw(box.div, runs.flatMap(lossTraces), { ...marks, xaxis, showlegend: !empty });
  box.div.removeAllListeners?.("plotly_click");
  box.div.on("plotly_click", (event) => {
    const point = event.points.find((one) => one.customdata != null && one.data.meta != null);
    if (point) openIncident(point.data.meta, point.customdata);
  });
  for (const [key, title, axis] of CURVES) {
    const box = card(parent, "plot-" + key, t(title));
    const has = runs.map((run, index) => [run, index]).filter(([run]) => run.curves[key].x.length);
    const one =
      key === "loss_scale" && has.every(([run]) => !run.skipped.length && run.curves[key].y.every((y) => y === 1));
    box.div.hidden = !has.length || one;
    box.box.hidden = !has.length && OPTIONAL.includes(key);
    box.say(has.length ? (one ? t("no_loss_scale") : "") : t("not_recorded"));
    if (box.div.hidden) continue;
    const scaled = (points) =>
      key === "memory" ? { x: points.x, y: points.y.map((y) => value(y) / 1048576) } : points;
    const traces = has.map(([run, index]) =>
      line(index, several() ? run.name : t("scale"), scaled(run.curves[key]), {
        line: {
          shape: key === "loss_scale" ? "hv" : "linear",
          color: colour(index),
          dash: dash(index),
          width: STEADY.includes(key) ? 2 : 1.2,
        },
      }),
    );
    if (key === "loss_scale")
      has.forEach(([run, index]) => {
        if (run.skipped.length) traces.push(skippedTrace(run, index));
      });
    draw(box.div, traces, {
      shapes: marks.shapes,
      xaxis,
      yaxis: {
        ...axis,
        ...logTicks(
          key,
          traces.flatMap((one) => one.y),
        ),
      },
      showlegend: several() || traces.length > 1,
    });
  }
}

function drawLogits() {
  const run = state.runs[state.site.run],
    sampled = run.sites,
    names = sampled ? Object.keys(sampled.logits) : [];
  if (!names.length) {
    fill("logits-body", note(t("no_logits")));
    return;
  }
  let div = $("plot-logits");
  if (!div) {
    div = el("div", { id: "plot-logits", class: "plot", role: "img" });
    fill("logits-body", el("p", { class: "note", id: "logits-note" }), el("div", { class: "card" }, div));
  }
  $("logits-note").textContent = t("logits_note") + (several() ? " " + t("of_run", { run: run.name }) : "");
  div.setAttribute("aria-label", t("logits"));
  draw(
    div,
    names.map((name, index) =>
      line(index, name, { x: sampled.steps, y: sampled.logits[name] }, { mode: "lines+markers", marker: { size: 5 } }),
    ),
    { showlegend: true, hovermode: "closest" },
  );
}
