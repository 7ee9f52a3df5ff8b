// What the pages do beyond htmx: theme, menu, plots, confirmation, uploads with drag and drop, rows of forms.
"use strict";
(() => {
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const COLOURS = ["--a", "--b", "--c", "--d", "--bad", "--soft"];

  function draw(figure) {
    const at = JSON.parse(figure.dataset.at), series = JSON.parse(figure.dataset.series);
    const canvas = figure.querySelector(".canvas");
    canvas.textContent = "";
    if (!at.length) return;
    const axis = { stroke: css("--soft"), grid: { stroke: css("--line") }, ticks: { stroke: css("--line") } };
    new uPlot({
      width: Math.max(240, canvas.clientWidth), height: Number(figure.dataset.height) || 180,
      cursor: { drag: { x: true, y: false } },
      series: [{}, ...series.map((one, index) => ({
        label: one.label, stroke: css(COLOURS[index % COLOURS.length]), width: 2, spanGaps: false,
        points: { show: at.length < 40 },
      }))],
      axes: [axis, { ...axis, size: (_, texts) => Math.max(44, 20 + 7.5 * Math.max(0, ...(texts || []).map((text) => text.length))) }],
      // Of a single time uPlot would make a range of years.
      scales: { x: { range: (_, low, high) => (at.length === 1 ? [at[0] - 1800, at[0] + 1800] : [low, high]) }, y: { range: (_, low, high) => [Math.min(0, low), high > 0 ? high * 1.08 : 1] } },
    }, [at, ...series.map((one) => one.values)], canvas);
  }
  const drawAll = (root) => root.querySelectorAll("figure.plot[data-at]").forEach(draw);

  function send(file, bar) {
    return new Promise((resolve, reject) => {
      const request = new XMLHttpRequest();
      request.open("POST", "/api/v1/uploads");
      request.upload.onprogress = (event) => { if (event.lengthComputable) { bar.max = event.total; bar.value = event.loaded; } };
      request.onload = () => {
        let said = {};
        try { said = JSON.parse(request.responseText); } catch { /* no JSON: the status says it */ }
        if (request.status < 300) resolve(said.digest); else reject(said.detail || `the server answered ${request.status}`);
      };
      request.onerror = () => reject("the connection broke off: try again");
      request.send(file);
    });
  }

  async function take(drop, file) {
    const bar = drop.querySelector("progress"), said = drop.querySelector(".said"), kept = drop.querySelector("input[type=hidden]");
    bar.hidden = false; bar.value = 0; kept.value = ""; said.textContent = `${file.name}: uploading`;
    drop.dispatchEvent(new CustomEvent("busy", { bubbles: true, detail: 1 }));
    try {
      kept.value = await send(file, bar);
      const name = drop.querySelector("input[data-name]");
      if (name) name.value = file.name;
      said.textContent = `${file.name}: uploaded (${kept.value.slice(0, 12)}…)`;
    } catch (reason) {
      said.textContent = `${file.name}: ${reason}`;
    }
    drop.dispatchEvent(new CustomEvent("busy", { bubbles: true, detail: -1 }));
  }

  function follow(box) {
    const events = new EventSource(box.dataset.log);
    events.addEventListener("line", (event) => {
      const line = JSON.parse(event.data), text = document.createElement("div");
      text.textContent = `${new Date(line.at * 1000).toISOString().slice(11, 23)} ${line.level} ${line.source} ${line.logger}: ${line.text}`;
      const low = innerHeight + scrollY >= document.body.scrollHeight - 80;
      box.append(text);
      while (box.children.length > 5000) box.firstElementChild.remove();
      if (low) text.scrollIntoView({ block: "nearest" });
    });
    events.addEventListener("end", () => events.close());
  }

  function prepare(root) {
    drawAll(root);
    root.querySelectorAll("[data-log]").forEach((box) => { if (!box.dataset.ready) { box.dataset.ready = "1"; follow(box); } });
    root.querySelectorAll(".drop").forEach((drop) => {
      if (drop.dataset.ready) return;
      drop.dataset.ready = "1";
      const input = drop.querySelector("input[type=file]");
      input.addEventListener("change", () => { if (input.files[0]) take(drop, input.files[0]); });
      for (const name of ["dragenter", "dragover"]) drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
      for (const name of ["dragleave", "drop"]) drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.remove("over"); });
      drop.addEventListener("drop", (event) => { const file = event.dataTransfer.files[0]; if (file) take(drop, file); });
    });
  }

  document.addEventListener("DOMContentLoaded", () => {
    prepare(document);
    const menu = document.querySelector(".menu"), nav = document.getElementById("nav");
    menu?.addEventListener("click", () => menu.setAttribute("aria-expanded", String(nav.classList.toggle("open"))));
    document.querySelector(".theme")?.addEventListener("click", () => {
      const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      document.documentElement.dataset.theme = theme;
      localStorage.setItem("shoal-theme", theme);
      drawAll(document);
    });
    let width = innerWidth;
    addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(document); } });
  });
  document.addEventListener("htmx:afterSwap", (event) => prepare(event.detail.elt));
  document.addEventListener("submit", (event) => {
    const asked = event.submitter?.dataset.confirm || event.target.dataset.confirm;
    if (asked && !confirm(asked)) event.preventDefault();
  });
  document.addEventListener("click", (event) => {
    const all = event.target.closest("input[data-all]");
    if (all) document.querySelectorAll(`input[name="${all.dataset.all}"]`).forEach((one) => { one.checked = all.checked; });
    const add = event.target.closest("[data-add]");
    if (add) { const rows = document.querySelector(add.dataset.add); const last = rows.lastElementChild.cloneNode(true); rows.append(last); last.querySelector("input,select").focus(); }
    const gone = event.target.closest("[data-remove]");
    if (gone) { const row = gone.closest(gone.dataset.remove); if (row.parentElement.children.length > 1) row.remove(); }
  });
  document.addEventListener("busy", (event) => {
    const form = event.target.closest("form"), button = form?.querySelector("button[type=submit]");
    if (!button) return;
    form.dataset.busy = Number(form.dataset.busy || 0) + event.detail;
    button.disabled = Number(form.dataset.busy) > 0;
  });
})();
