// The sections that are text: findings, incidents, samples, configuration, how to reproduce.

const each = (draw) =>
  el(
    "div",
    { class: "runs" },
    state.runs.map((run, index) =>
      el("div", {}, several() ? el("h3", {}, swatch(index), run.name) : null, draw(run, index)),
    ),
  );

function drawFindings() {
  fill(
    "findings-body",
    each((run) => {
      const found = run.sites?.findings ?? [];
      if (!found.length) return note(t(run.sites ? "no_findings" : "no_sites"));
      const box = el(
        "div",
        { class: "scroll table tall", tabindex: "0", role: "group", "aria-label": t("findings") },
        grid(
          [[t("step"), "n"], [t("kind")], [t("site")], [t("finding"), "text"]],
          found.map((one) => [
            count(one.step),
            one.kind,
            run.sites.names.includes(one.site)
              ? el(
                  "button",
                  {
                    type: "button",
                    onclick: () => {
                      state.site.run = state.runs.indexOf(run);
                      drawSites();
                      drawSiteTable();
                      openPanel("site", one.site);
                    },
                  },
                  one.site,
                )
              : el("code", {}, one.site),
            one.text,
          ]),
        ),
      );
      return [
        run.sites.findings_of > found.length
          ? note(t("findings_thinned", { n: count(run.sites.findings_of), shown: found.length }))
          : null,
        box,
      ].filter(Boolean);
    }),
  );
}

const kindOf = (kind) => (TEXTS["kind_" + kind] ? t("kind_" + kind) : (kind ?? "–"));

function copyable(text) {
  const pre = el("pre", { tabindex: "0" }, text);
  const button = el(
    "button",
    {
      type: "button",
      onclick: async () => {
        try {
          await navigator.clipboard.writeText(text);
          button.textContent = t("copied");
        } catch {
          getSelection().selectAllChildren(pre);
          button.textContent = t("selected");
        }
        setTimeout(() => {
          button.textContent = t("copy");
        }, 2000);
      },
    },
    t("copy"),
  );
  return el("div", { class: "copy" }, pre, button);
}

const incidentKey = (one) => `${one.step}-${one.kind}`; // as the folders are named

function incident(one, index, open) {
  const facts = [
    [t("steps"), one.steps.length > 8 ? one.steps.slice(0, 8).join(", ") + ", …" : one.steps.join(", ")],
    [t("site"), one.site],
    [t("summary_policy"), one.policy],
    [t("phase"), one.phase],
    [t("loss"), loss(one.loss)],
    [t("fact_scale"), figures(one.loss_scale)],
    [t("fact_norm"), figures(one.grad_norm)],
    [t("time"), known(one.time) ? new Date(one.time * 1000).toLocaleString(locale()) : null],
  ].filter(([, v]) => v != null && v !== "" && v !== "–");
  return el(
    "details",
    { id: `incident-${index}-${incidentKey(one)}`, open },
    el("summary", {}, `${t("step_n", { n: count(one.step) })} · ${kindOf(one.kind)} · ${one.what ?? ""}`),
    el(
      "table",
      {},
      el(
        "tbody",
        {},
        facts.map(([key, v]) => el("tr", {}, el("th", { scope: "row" }, key), el("td", {}, String(v)))),
      ),
    ),
    one.rule ? [el("h3", {}, t("rule")), note(t("rule_note")), copyable(one.rule)] : [],
    one.worst.length
      ? [
          el("h3", {}, t("worst_sites", { n: one.sites })),
          el(
            "div",
            { class: "scroll table", tabindex: "0", role: "group", "aria-label": t("worst_sites", { n: one.sites }) },
            grid(
              [
                [t("site")],
                [t("format")],
                [t("sqnr"), "n"],
                [t("underflow"), "n"],
                [t("overflow"), "n"],
                [t("amax"), "n"],
                [t("nonfinite"), "n"],
              ],
              one.worst.map((s) => [
                el("code", {}, s.site),
                s.format,
                decibel(s.sqnr),
                share(s.underflow),
                share(s.overflow),
                figures(s.amax),
                count(s.nonfinite),
              ]),
            ),
          ),
        ]
      : [],
    one.traceback ? [el("h3", {}, t("traceback")), el("pre", { tabindex: "0" }, one.traceback)] : [],
    one.more
      ? el("details", {}, el("summary", {}, t("more")), el("pre", { class: "wrap", tabindex: "0" }, one.more))
      : [],
  );
}

function drawIncidents() {
  const open = new Set([...$("incidents-body").querySelectorAll("details[open]")].map((one) => one.id));
  fill(
    "incidents-body",
    each((run, index) =>
      [
        run.incidents.count > run.incidents.shown.length
          ? note(t("incidents_thinned", { n: count(run.incidents.count), shown: run.incidents.shown.length }))
          : null,
        run.incidents.broken.length ? note(t("incidents_broken", { names: run.incidents.broken.join(", ") })) : null,
        ...(run.incidents.shown.length
          ? run.incidents.shown.map((one) => incident(one, index, open.has(`incident-${index}-${incidentKey(one)}`)))
          : [note(t("no_incidents"))]),
      ].filter(Boolean),
    ),
  );
}

function openIncident(index, key) {
  const one = $(`incident-${index}-${key}`);
  if (!one) return;
  one.open = true;
  one.scrollIntoView({ block: "center" });
  one.firstChild.focus();
}

function drawSamples() {
  const seen = [...$("samples-body").querySelectorAll("details")],
    ids = (list) => new Set(list.map((one) => one.id));
  const closed = ids(seen.filter((one) => !one.open)),
    open = ids(seen.filter((one) => one.open && !one.dataset.newest));
  fill(
    "samples-body",
    each((run, index) => {
      if (!run.samples.length) return note(t("no_samples"));
      const more =
        run.samples_of > run.samples.length
          ? [note(t("samples_thinned", { n: count(run.samples_of), shown: run.samples.length }))]
          : [];
      return [
        ...more,
        ...run.samples.toReversed().map((one, k) => {
          const id = `sample-${index}-${one.step}`;
          return el(
            "details",
            { id, "data-newest": k === 0, open: k === 0 ? !closed.has(id) : open.has(id) },
            el("summary", {}, t("step_n", { n: count(one.step) })),
            el("pre", { class: "wrap", tabindex: "0" }, one.text),
          );
        }),
      ];
    }),
  );
}

function drawConfig() {
  const keys = [...new Set(state.runs.flatMap((run) => Object.keys(run.keys)))];
  const differ = keys.filter((key) => new Set(state.runs.map((run) => run.keys[key])).size > 1);
  const table = !several()
    ? null
    : !differ.length
      ? note(t("config_same"))
      : [
          el("h3", {}, t("config_differs")),
          el(
            "div",
            { class: "scroll table tall", tabindex: "0", role: "group", "aria-label": t("config_differs") },
            grid(
              [[t("key")], ...state.runs.map((run) => [run.name, "text"])],
              differ.map((key) => [
                el("code", {}, key),
                ...state.runs.map((run) => el("code", {}, run.keys[key] ?? "–")),
              ]),
            ),
          ),
        ];
  fill(
    "config-body",
    table,
    each((run) =>
      [
        ["config.toml", run.config],
        ["policy.toml", run.policy],
      ].map(([name, text]) =>
        el(
          "details",
          { open: !several() },
          el("summary", {}, name),
          text == null ? note(t("not_readable")) : el("pre", { tabindex: "0" }, text),
        ),
      ),
    ),
  );
}

function drawReproduce() {
  fill(
    "reproduce-body",
    each((run) => [
      ...["again", "resume", "compare"].flatMap((key, k) => [
        note(t("reproduce_" + key)),
        copyable(run.reproduce.commands[k]),
      ]),
      run.reproduce.sha256
        ? el(
            "p",
            { class: "note" },
            t("text_is", { source: run.reproduce.source ?? "–" }) + " ",
            el("code", {}, run.reproduce.sha256),
          )
        : note(t("text_unknown")),
    ]),
  );
  fill("footer", t("footer", { version: DATA.version, plotly: Plotly.version }));
}
