// Heatmaps of sites, or of weights, over the sampled steps.

// The more is lost, the further from the background: lightness alone tells it, whatever colours somebody sees.
const LOSS = {
  light: ["#f1f3f5", "#f7c9a0", "#d9733a", "#98321b", "#45110c"],
  dark: ["#1d242c", "#5a2f25", "#b5532f", "#f0975a", "#ffe9d2"],
};
const scale = (colours) => colours.map((one, i) => [i / (colours.length - 1), one]);

const logShare = {
  // zero and everything below a millionth have the first colour
  z: (v) => Math.log10(Math.max(v, 1e-6)),
  min: -6,
  max: 0,
  show: share,
  lost: "high",
  ticks: [
    [-6, "0"],
    [-4, "0.01%"],
    [-3, "0.1%"],
    [-2, "1%"],
    [-1, "10%"],
    [0, "100%"],
  ],
};
const MEASURES = {
  // One scale for all runs and policies: 60 dB and more is what 16 bits lose at most.
  sqnr: { z: (v) => v, show: decibel, suffix: " dB", lost: "low", min: 0, max: 60 },
  underflow: logShare,
  overflow: logShare,
  lost: logShare,
  unseen: logShare,
  amax: { z: (v) => (v > 0 ? Math.log2(v) : null), show: figures, power: 2 },
  ratio: { z: (v) => (v > 0 ? Math.log10(v) : null), show: figures, power: 10 },
};
const superscript = (n) => String(n).replace(/[-0-9]/g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]));

function choice(label, options, now, changed) {
  return el(
    "label",
    {},
    label,
    el(
      "select",
      { onchange: (event) => changed(event.target.value) },
      options.map(([key, text]) => el("option", { value: key, selected: key === String(now) }, text)),
    ),
  );
}

const runChoice = (part, redraw) =>
  several()
    ? [
        choice(
          t("run"),
          state.runs.map((run, i) => [String(i), run.name]),
          part.run,
          (now) => {
            part.run = Number(now);
            redraw();
          },
        ),
      ]
    : [];

// rows: [[name, index of its row in the values]]; cells are drawn for the steps as categories, evenly wide.
function heat(box, { key, rows, values, broken, steps, measure, clicked, empty }) {
  let div = box.firstElementChild;
  if (!rows.length) {
    if (div) Plotly.purge(div);
    box.replaceChildren(el("p", { class: "note", style: { padding: "0 1rem" } }, empty));
    return;
  }
  if (!div || !div.classList.contains("heat")) {
    div = el("div", { class: "heat" });
    box.replaceChildren(div);
  }
  const kind = MEASURES[measure],
    narrow = box.clientWidth < 600,
    most = narrow ? 20 : 48;
  const cell = (row, i) => (known(values[row][i]) ? kind.z(value(values[row][i])) : null);
  let z = rows.map(([, row]) => steps.map((_, i) => cell(row, i)));
  const flat = z.flat().filter((v) => v != null && Number.isFinite(v));
  const low = kind.min ?? Math.floor(flat.reduce((a, b) => Math.min(a, b), Infinity));
  const high = kind.max ?? Math.ceil(flat.reduce((a, b) => Math.max(a, b), -Infinity));
  const best = flat.length ? high : 1; // the colour of cells in which nothing was lost
  z = z.map((line) => line.map((v) => (v === Infinity ? best : v)));
  const bad = (row, i) => broken?.[row][i] > 0;
  if (kind.lost) z = z.map((line, r) => line.map((v, i) => (bad(rows[r][1], i) ? (kind.lost === "low" ? low : high) : v)));
  let ticks = kind.ticks;
  if (kind.power && flat.length) {
    const gap = Math.max(1, Math.ceil((high - low) / 6));
    ticks = [];
    for (let e = low; e <= high; e += gap) ticks.push([e, kind.power + superscript(e)]);
  }
  const height = Math.max(rows.length, 3) * 16 + 110;
  div.style.height = height + "px";
  draw(
    div,
    [
      {
        type: "heatmap",
        z,
        x: steps.map(String),
        y: rows.map((_, i) => i),
        xgap: steps.length < 40 ? 1 : 0,
        ygap: 1,
        zmin: flat.length ? low : 0,
        zmax: flat.length ? Math.max(high, low + 1e-9) : 1,
        colorscale: kind.lost ? scale(LOSS[state.theme]) : "Viridis",
        reversescale: kind.lost === "low",
        text: rows.map(([, row]) => steps.map((_, i) => (bad(row, i) ? "✕" : ""))),
        texttemplate: "%{text}",
        hoverinfo: "text",
        hovertext: rows.map(([name, row]) =>
          steps.map(
            (step, i) =>
              `${plain(name)}<br>${t("step")} ${count(step)}<br>${t(measure)} ` +
              (known(values[row][i]) ? plain(kind.show(values[row][i])) : t("no_value")) +
              (bad(row, i) ? `<br>${t("nonfinite")} ${count(broken[row][i])}` : ""),
          ),
        ),
        colorbar: {
          orientation: "h",
          y: 1,
          yanchor: "bottom",
          yref: "paper",
          thickness: 10,
          len: 1,
          ticksuffix: kind.suffix,
          outlinewidth: 0,
          x: 0,
          xanchor: "left",
          ypad: 8,
          ...(ticks ? { tickvals: ticks.map((one) => one[0]), ticktext: ticks.map((one) => one[1]) } : { nticks: 6 }),
        },
      },
    ],
    {
      height,
      uirevision: key,
      dragmode: false,
      margin: { l: 30, r: 16, t: 50, b: 52 },
      xaxis: {
        type: "category",
        title: { text: t("step"), standoff: 16 },
        nticks: narrow ? 6 : 14,
        fixedrange: true,
        showgrid: false,
      },
      yaxis: {
        range: [rows.length - 0.5, -0.5],
        fixedrange: true,
        showgrid: false,
        zeroline: false,
        tickvals: rows.map((_, i) => i),
        ticktext: rows.map(([name]) => short(name, most)),
        tickfont: { size: narrow ? 9 : 11 },
        ticks: "",
      },
    },
  );
  div.removeAllListeners?.("plotly_click");
  div.on("plotly_click", (event) => clicked(rows[event.points[0].y][0], event.points[0].pointIndex[1]));
}

function chosenSites(sampled) {
  // [[name, index]] after the group and the filter
  const words = state.site.filter.toLowerCase().split(/\s+/).filter(Boolean);
  return sampled.names
    .map((name, index) => [name, index])
    .filter(
      ([name, index]) =>
        (state.site.group === "all" || sampled.groups[index] === state.site.group) &&
        words.every((word) => name.toLowerCase().includes(word)),
    );
}

function drawSites() {
  const run = state.runs[state.site.run],
    sampled = run.sites,
    all = state.runs.some((one) => one.sites);
  $("sites-note").replaceChildren(
    note(
      !sampled
        ? t("no_sites")
        : sampled.of > sampled.steps.length
          ? t("sampled_thinned", { n: count(sampled.of), shown: sampled.steps.length })
          : t("sampled", { n: count(sampled.of) }),
    ),
    ...(sampled ? [note(t("heat_key"))] : []),
  );
  for (const id of ["sites-controls", "sites-heat", "sites-table"]) $(id).hidden = !all;
  if (!all) return;
  const formats = sampled ? Object.keys(sampled.whatif) : [];
  if (!formats.includes(state.site.format)) state.site.format = "";
  const focused = document.activeElement?.id,
    at = document.activeElement?.selectionStart;
  const redraw = () => {
    drawSites();
    drawSiteTable();
  };
  fill(
    "sites-controls",
    ...runChoice(state.site, () => {
      redraw();
      drawLogits();
    }),
    choice(
      t("measure"),
      ["sqnr", "underflow", "overflow", "amax"].map((key) => [key, t(key)]),
      state.site.measure,
      (now) => {
        state.site.measure = now;
        drawSites();
      },
    ),
    choice(
      t("group"),
      ["all", "forward", "backward", "weights"].map((key) => [key, t("group_" + key)]),
      state.site.group,
      (now) => {
        state.site.group = now;
        redraw();
      },
    ),
    formats.length
      ? choice(
          t("summary_policy"),
          [["", t("as_trained")], ...formats.map((name) => [name, t("what_if", { policy: name })])],
          state.site.format,
          (now) => {
            state.site.format = now;
            redraw();
          },
        )
      : null,
    el(
      "label",
      {},
      t("filter"),
      el("input", {
        id: "filter",
        type: "search",
        value: state.site.filter,
        placeholder: "attn qkv",
        autocomplete: "off",
        spellcheck: "false",
        oninput: (event) => {
          state.site.filter = event.target.value;
          redraw();
        },
      }),
    ),
  );
  if (focused === "filter") {
    $("filter").focus();
    $("filter").setSelectionRange?.(at, at);
  }
  const source = sampled && (state.site.format ? sampled.whatif[state.site.format] : sampled);
  heat($("sites-heat"), {
    key: [state.site.run, state.site.group, state.site.filter].join(),
    rows: sampled ? chosenSites(sampled) : [],
    empty: t(sampled ? "no_match" : "no_sites"),
    values: source?.[state.site.measure],
    broken: sampled?.nonfinite,
    steps: sampled?.steps,
    measure: state.site.measure,
    clicked: (name, at) => openPanel("site", name, at),
  });
}

function drawUpdates() {
  const run = state.runs[state.update.run],
    sampled = run.sites,
    all = state.runs.some((one) => one.sites?.weights.length);
  $("updates-note").replaceChildren(note(t(sampled?.weights.length ? "updates_note" : "no_updates")));
  for (const id of ["updates-controls", "updates-heat", "updates-more"]) $(id).hidden = !all;
  if (!all) return;
  fill(
    "updates-controls",
    ...runChoice(state.update, drawUpdates),
    choice(
      t("measure"),
      ["ratio", "lost", "unseen"].map((key) => [key, t(key)]),
      state.update.measure,
      (now) => {
        state.update.measure = now;
        drawUpdates();
      },
    ),
  );
  const names = sampled ? sampled.weights : [],
    last = sampled ? sampled.steps.length - 1 : 0;
  heat($("updates-heat"), {
    key: "updates" + state.update.run,
    rows: names.map((name, index) => [name, index]),
    empty: t("no_updates"),
    values: sampled?.updates[state.update.measure],
    steps: sampled?.steps,
    measure: state.update.measure,
    clicked: (name, at) => openPanel("weight", name, at),
  });
  const latest = (key, row) => sampled.updates[key][row].findLast((v) => v != null) ?? sampled.updates[key][row][last];
  fill(
    "updates-table",
    grid(
      [[t("weight")], [t("ratio"), "n"], [t("lost"), "n"], [t("unseen"), "n"]],
      names.map((name, row) => [
        opener("weight", name),
        figures(latest("ratio", row)),
        share(latest("lost", row)),
        share(latest("unseen", row)),
      ]),
    ),
  );
  arrows($("updates-table"));
}
