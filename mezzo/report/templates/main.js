// The whole page: language, theme, and following a running job.

const SECTIONS = [
  "summary",
  "curves",
  "sites",
  "updates",
  "logits",
  "findings",
  "incidents",
  "samples",
  "config",
  "reproduce",
];

function drawAll() {
  document.documentElement.lang = state.lang === "zh" ? "zh-CN" : "en";
  document.documentElement.dataset.theme = state.theme;
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", t(node.dataset.label));
  Object.assign($("lang"), {
    textContent: state.lang === "zh" ? "English" : "中文",
    lang: state.lang === "zh" ? "en" : "zh",
  });
  $("theme").textContent = t(state.theme === "dark" ? "theme_light" : "theme_dark");
  fill(
    "nav",
    SECTIONS.map((id) => el("a", { href: "#" + id }, t(id))),
  );
  drawVerdict();
  drawSummary();
  drawCurves();
  drawMeasured();
  drawIncidents();
  drawSamples();
  drawConfig();
  drawReproduce();
  drawPanel();
  drawLive();
}

function drawMeasured() {
  drawSites();
  drawSiteTable();
  drawUpdates();
  drawLogits();
  drawFindings();
}

// A run that is followed: only what changed is drawn again.
function take(runs) {
  const text = (list, part) => JSON.stringify(list.map(part));
  const changed = (part) => text(state.runs, part) !== text(runs, part);
  const measured = changed((run) => run.sites),
    happened = changed((run) => run.incidents),
    wrote = changed((run) => run.samples),
    set = changed((run) => [run.keys, run.config, run.policy]);
  state.runs = runs;
  drawVerdict();
  drawSummary();
  drawCurves();
  if (measured) {
    drawMeasured();
    drawPanel();
  }
  if (happened) drawIncidents();
  if (wrote) drawSamples();
  if (set) drawConfig();
  drawLive();
}

let gone = false;

function drawLive() {
  const box = $("live");
  box.hidden = DATA.live == null;
  const ended = state.runs.every((run) => !run.live && run.status !== "empty");
  box.className = "live" + (gone ? " gone" : "");
  const text = t(
    gone
      ? "live_gone"
      : ended
        ? "live_ended"
        : state.runs.every((run) => run.last == null)
          ? "live_waiting"
          : "live_following",
  );
  if (box.textContent !== text) box.textContent = text; // a screen reader says it only when it changes
}

async function follow() {
  try {
    const answer = await fetch("/data.json", {
      cache: "no-store",
      headers: state.version ? { "If-None-Match": state.version } : {},
      signal: AbortSignal.timeout(20000),
    });
    if (answer.status !== 304 && !answer.ok) throw new Error(answer.status);
    const back = gone;
    gone = false;
    if (answer.status === 200) {
      const { runs } = await answer.json();
      state.version = answer.headers.get("ETag");
      take(runs);
    } else if (back) drawLive();
  } catch {
    gone = true;
    drawLive();
  }
  setTimeout(follow, 2000);
}

function start() {
  const wanted =
    DATA.lang === "auto"
      ? (stored("lang") ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"))
      : DATA.lang;
  state.lang = wanted === "zh" ? "zh" : "en";
  const system = matchMedia("(prefers-color-scheme: dark)");
  state.theme = stored("theme") ?? (system.matches ? "dark" : "light");
  system.addEventListener("change", () => {
    if (!stored("theme")) {
      state.theme = system.matches ? "dark" : "light";
      drawAll();
    }
  });
  $("lang").addEventListener("click", () => {
    state.lang = state.lang === "zh" ? "en" : "zh";
    stored("lang", state.lang);
    drawAll();
  });
  $("theme").addEventListener("click", () => {
    state.theme = state.theme === "dark" ? "light" : "dark";
    stored("theme", state.theme);
    drawAll();
  });
  $("panel").addEventListener("close", closePanel);
  $("panel").addEventListener("click", (event) => {
    if (event.target === $("panel")) $("panel").close();
  });
  state.site.run = state.update.run = Math.max(
    0,
    state.runs.findIndex((run) => run.sites),
  );
  drawAll();
  if (DATA.live != null) setTimeout(follow, 2000);
}

start();
