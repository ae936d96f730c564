// Draws the figures of a page: plotly.min.js is loaded once, when the first figure comes near, from beside this file.
// A figure that leaves the screen is taken down again, because a browser keeps about sixteen WebGL scenes and no more.
(function () {
  "use strict";
  const here = document.currentScript.src.replace(/[^/]*$/, "");
  let library = null;

  function run(code) {
    const script = document.createElement("script");
    script.textContent = code;
    document.head.appendChild(script);
  }

  function load() {
    library = library || new Promise(function (done, failed) {
      const script = document.createElement("script");
      script.src = here + "plotly.min.js";
      script.onload = function () { window.plotlyPacked.then(run).then(function () { done(window.Plotly); }, failed); };
      script.onerror = failed;
      document.head.appendChild(script);
    });
    return library;
  }

  const ink = function () { return getComputedStyle(document.body).color; };

  function link(plot, scenes) {  // turn one surface, turn all
    let busy = false;
    plot.on("plotly_relayout", function (change) {
      const key = Object.keys(change).find(function (k) { return k.endsWith(".camera"); });
      if (busy || !key) return;
      const same = {};
      scenes.forEach(function (s) { if (s + ".camera" !== key) same[s + ".camera"] = change[key]; });
      busy = true;
      window.Plotly.relayout(plot, same).then(function () { busy = false; });
    });
  }

  function columns(layout) {  // panels side by side
    const starts = Object.keys(layout).filter(function (k) { return /^(scene|xaxis)\d*$/.test(k); }).map(function (k) {
      return ((layout[k].domain || {}).x || layout[k].domain || [0])[0];
    });
    return new Set(starts).size;
  }

  function fit(figure, plot, layout) {  // panels keep a width that can be read; on a narrow screen they scroll sideways
    const many = columns(layout);
    if (many > 1) plot.style.minWidth = 90 + 210 * many + "px";
    figure.style.overflowX = many > 1 ? "auto" : "";
  }

  function draw(figure) {
    if (figure.dataset.state) return;
    figure.dataset.state = "drawing";
    load().then(function (Plotly) {
      const spec = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
      const plot = figure.querySelector(".vc-plot");
      spec.layout.font = Object.assign({}, spec.layout.font, { color: ink() });
      figure.classList.add("live");
      fit(figure, plot, spec.layout);
      return Plotly.newPlot(plot, spec.data, spec.layout, { responsive: true, displaylogo: false, typesetMath: false, displayModeBar: window.innerWidth < 600 ? false : "hover" }).then(function () {
        figure.dataset.state = "drawn";
        document.dispatchEvent(new Event("vc-drawn"));  // access.js looks whether it scrolls
        const scenes = (spec.layout.meta || {}).linked;
        if (scenes && scenes.length > 1) link(plot, scenes);
      });
    }).catch(function (error) {  // no WebGL, no library: the PNG is still there
      console.warn("figure not drawn:", error);
      figure.classList.remove("live");
      figure.dataset.state = "failed";
    });
  }

  function drop(figure) {
    const plot = figure.querySelector(".vc-plot");
    if (figure.dataset.state !== "drawn" || !plot.querySelector("canvas")) return;
    figure.style.minHeight = figure.offsetHeight + "px";
    window.Plotly.purge(plot);
    figure.classList.remove("live");
    delete figure.dataset.state;
  }

  function start() {
    const figures = Array.from(document.querySelectorAll(".vc-figure[data-plot]"));
    const near = new IntersectionObserver(function (seen) {
      seen.forEach(function (e) { (e.isIntersecting ? draw : drop)(e.target); });
    }, { rootMargin: "400px 0px" });
    figures.forEach(function (f) { near.observe(f); });
    new MutationObserver(function () {  // the reader switches between light and dark
      figures.filter(function (f) { return f.dataset.state === "drawn"; }).forEach(function (f) {
        window.Plotly.relayout(f.querySelector(".vc-plot"), { "font.color": ink() });
      });
    }).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
