// Tables: what they share, the verdict, the summary, the table of sites.

// head: [[title, class, key to sort by]]; rows: lists of texts or elements
function grid(head, rows, { sorted, sort } = {}) {
  return el(
    "table",
    {},
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        head.map(([title, kind, key]) =>
          el(
            "th",
            {
              scope: "col",
              class: kind,
              "aria-sort": sort && key === sorted.sort ? (sorted.down ? "descending" : "ascending") : null,
            },
            sort && key
              ? el(
                  "button",
                  { type: "button", "data-sort": key, onclick: () => sort(key) },
                  title + (key === sorted.sort ? (sorted.down ? " ↓" : " ↑") : ""),
                )
              : title,
          ),
        ),
      ),
    ),
    el(
      "tbody",
      {},
      rows.map((row) =>
        el(
          "tr",
          {},
          row.map((cell, i) => el(i ? "td" : "th", { class: head[i][1], scope: i ? null : "row" }, cell ?? "–")),
        ),
      ),
    ),
  );
}

const opener = (kind, name) =>
  el(
    "button",
    {
      type: "button",
      "data-name": name,
      tabindex: "-1",
      "aria-haspopup": "dialog",
      onclick: () => openPanel(kind, name),
    },
    name,
  );

// One stop for Tab in a table, arrow keys within.
function arrows(box) {
  const all = [...box.querySelectorAll("tbody button[data-name]")];
  if (all.length && !all.some((one) => one.tabIndex === 0)) all[0].tabIndex = 0;
  box.onkeydown = (event) => {
    const now = all.indexOf(document.activeElement);
    const next = {
      ArrowDown: now + 1,
      ArrowUp: now - 1,
      Home: 0,
      End: all.length - 1,
      PageDown: now + 10,
      PageUp: now - 10,
    }[event.key];
    if (now < 0 || next === undefined) return;
    event.preventDefault();
    const target = all[Math.max(0, Math.min(all.length - 1, next))];
    for (const one of all) one.tabIndex = one === target ? 0 : -1;
    target.focus();
  };
}

function drawVerdict() {
  $("title").textContent = document.title = state.runs.map((run) => run.name).join(", ");
  document.title += " · mezzo";
  fill(
    "verdict",
    state.runs.map((run, index) => {
      const parts = [
        run.last == null
          ? t("no_steps")
          : run.planned == null
            ? t("steps_done", { step: count(run.last) })
            : t("steps_of", { step: count(run.last), planned: count(run.planned) }),
      ];
      if (run.summary.loss != null) parts.push(`${t("train_loss")} ${loss(run.summary.loss)}`);
      if (run.summary.val_loss != null) parts.push(`${t("held_out")} ${loss(run.summary.val_loss)}`);
      if (run.summary.val_loss_fp32 != null) parts.push(`${t("held_out_fp32")} ${loss(run.summary.val_loss_fp32)}`);
      if (run.summary.skipped) parts.push(t("n_skipped", { n: count(run.summary.skipped) }));
      if (run.summary.incidents) parts.push(t("n_incidents", { n: count(run.summary.incidents) }));
      return el(
        "p",
        { class: "verdict" },
        several() ? [swatch(index), el("strong", {}, run.name + " ")] : null,
        el("span", { class: "badge " + run.status }, t("status_" + run.status)),
        parts.join(t("comma")),
        run.problems.map((text) => note(text)),
      );
    }),
  );
}

const SUMMARY = [
  ["policy", (s) => s.policy],
  ["model", (s) => s.model],
  ["loss", (s) => loss(s.loss)],
  ["val_loss", (s) => loss(s.val_loss)],
  ["val_loss_fp32", (s) => loss(s.val_loss_fp32)],
  ["val_bits_per_byte", (s) => loss(s.val_bits_per_byte)],
  ["tokens", (s) => count(s.tokens)],
  ["seconds", (s) => duration(s.seconds)],
  ["tokens_per_s", (s) => count(s.tokens_per_s == null ? null : Math.round(value(s.tokens_per_s)))],
  ["mfu", (s) => share(s.mfu)],
  ["memory", (s) => bytes(s.memory)],
  ["skipped", (s) => count(s.skipped)],
  ["incidents", (s) => count(s.incidents)],
];

function drawSummary() {
  fill(
    "summary-body",
    el(
      "div",
      {
        class: "scroll table" + (several() ? "" : " narrow"),
        tabindex: "0",
        role: "group",
        "aria-label": t("summary"),
      },
      grid(
        [[""], ...state.runs.map((run, index) => [el("span", {}, several() ? swatch(index) : null, run.name), "v"])],
        SUMMARY.map(([key, show]) => [t("summary_" + key), ...state.runs.map((run) => show(run.summary) ?? "–")]),
      ),
    ),
  );
}

const COLUMNS = [
  ["sqnr", decibel],
  ["underflow", share],
  ["overflow", share],
  ["amax", figures],
  ["count", count],
  ["nonfinite", count],
];

function drawSiteTable() {
  const sampled = state.runs[state.site.run].sites;
  if (!sampled) {
    fill("sites-table");
    return;
  }
  const last = sampled.steps.length - 1,
    { sort, down } = state.site,
    box = $("sites-table"),
    top = box.scrollTop;
  const held = box.contains(document.activeElement) ? document.activeElement.dataset : null;
  const other = sampled.whatif[state.site.format];
  const cell = (column, row) => (other?.[column] ?? sampled[column])[row][last];
  const format = (row) => (other ? other.format[row] : sampled.formats[sampled.format[row][last]]?.name);
  const key = (row) => {
    if (sort === "format") return format(row) ?? "";
    if (sort === "sqnr" && sampled.nonfinite[row][last] > 0) return -Infinity; // nothing is worse
    return value(cell(sort, row)) ?? NaN;
  };
  const rows = chosenSites(sampled);
  if (sort !== "order")
    rows.sort(([one, a], [other, b]) => {
      if (sort === "site") return one.localeCompare(other) * (down ? -1 : 1);
      const x = key(a),
        y = key(b);
      // Sites without a value come last, either way.
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
    });
  const again = (by) => {
    Object.assign(state.site, {
      sort: by,
      down: state.site.sort === by ? !state.site.down : !["site", "format", "sqnr"].includes(by),
    });
    drawSiteTable();
  };
  box.replaceChildren(
    grid(
      [[t("site"), "", "site"], [t("format"), "", "format"], ...COLUMNS.map(([name]) => [t(name), "n", name])],
      rows.map(([name, row]) => [
        opener("site", name),
        el("code", {}, format(row) ?? "–"),
        ...COLUMNS.map(([column, show]) => show(cell(column, row))),
      ]),
      { sorted: state.site, sort: again },
    ),
  );
  arrows(box);
  box.scrollTop = top;
  if (held)
    box
      .querySelector(held.sort ? `[data-sort="${held.sort}"]` : `[data-name="${CSS.escape(held.name ?? "")}"]`)
      ?.focus();
}
