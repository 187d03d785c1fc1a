"use strict";
// Draws the charts of the page: those in view first, the others when the browser is idle, all before printing.
(function () {
  const holder = document.getElementById("chart-data");
  const root = document.documentElement;
  if (!holder || typeof Plotly === "undefined") {
    root.dataset.charts = "none";
    return;
  }
  const charts = JSON.parse(holder.textContent);
  const places = Array.from(document.querySelectorAll("[data-chart]"));
  const waiting = new Set(places);
  const config = {
    displaylogo: false,
    responsive: true,
    showTips: false,
    scrollZoom: false,
    displayModeBar: false,
  };
  const font = { family: "system-ui, sans-serif", size: 12 };

  function draw(place) {
    if (!waiting.delete(place)) return;
    const chart = charts[place.dataset.chart];
    place.replaceChildren();
    Plotly.newPlot(place, chart.data, Object.assign({ font: font, autosize: true }, chart.layout), config);
    if (!waiting.size) root.dataset.charts = "drawn";
  }

  function drawNext() {
    const next = waiting.values().next().value;
    if (!next) return;
    draw(next);
    schedule(drawNext);
  }

  const schedule = window.requestIdleCallback ? (work) => window.requestIdleCallback(work, { timeout: 300 }) : (work) => setTimeout(work, 10);
  if (!places.length) root.dataset.charts = "drawn";
  if (window.IntersectionObserver) {
    const observer = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting) draw(entry.target);
      }
    });
    places.forEach((place) => observer.observe(place));
  }
  schedule(drawNext);

  for (const button of document.querySelectorAll("button[data-log]")) {
    button.addEventListener("click", () => {
      const place = document.getElementById(button.dataset.log);
      draw(place);
      const isLog = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(isLog));
      Plotly.relayout(place, { "yaxis.type": isLog ? "log" : "linear", "yaxis.autorange": true });
    });
  }

  for (const select of document.querySelectorAll("select[data-axis]")) {
    select.addEventListener("change", () => {
      for (const group of document.querySelectorAll("[data-axis-group]")) {
        group.hidden = group.dataset.axisGroup !== select.value;
        for (const place of group.querySelectorAll("[data-chart]")) {
          draw(place);
          Plotly.Plots.resize(place);
        }
      }
    });
  }

  const paperWidth = 660;
  window.addEventListener("beforeprint", () => {
    places.forEach(draw);
    places.forEach((place) => Plotly.relayout(place, { width: paperWidth, autosize: false }));
  });
  window.addEventListener("afterprint", () => {
    places.forEach((place) => Plotly.relayout(place, { width: null, autosize: true }));
  });
})();
