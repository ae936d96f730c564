// What the theme leaves out for those who read with the keyboard or by ear.
(function () {
  "use strict";
  const all = function (selector) { return Array.from(document.querySelectorAll(selector)); };

  function named() {
    all("nav summary, .bd-links summary").forEach(function (s) {  // arrows of the list of pages
      const link = s.closest("li").querySelector("a");
      if (!s.textContent.trim() && link) s.setAttribute("aria-label", "Pages under " + link.textContent.trim());
    });
    all("details.above-input > summary[aria-label], details.above-output > summary[aria-label], .search-button-field[aria-label]").forEach(function (s) {
      s.removeAttribute("aria-label");  // it hides the words that stand there
    });
    all(".citation-list [role='doc-biblioentry']").forEach(function (c) { c.setAttribute("role", "listitem"); });
    const side = document.getElementById("pst-primary-sidebar");
    if (side && !side.hasAttribute("role")) {
      side.setAttribute("role", "complementary");
      side.setAttribute("aria-label", "Site");
    }
    all("article th").forEach(function (th) {
      if (!th.textContent.trim()) {  // a corner is no heading
        const td = document.createElement("td");
        th.getAttributeNames().forEach(function (n) { if (n !== "scope") td.setAttribute(n, th.getAttribute(n)); });
        th.replaceWith(td);
      } else if (!th.hasAttribute("scope")) {
        th.setAttribute("scope", th.closest("thead") ? "col" : "row");
      }
    });
  }

  function reachable() {  // what scrolls sideways can be scrolled by arrow keys
    all(".vc-output, .vc-card, .vc-figure, article pre, .pst-scrollable-table-container, article .math").forEach(function (box) {
      const wide = box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX !== "visible";
      if (wide && !box.hasAttribute("tabindex")) {
        box.setAttribute("tabindex", "0");
        box.dataset.wide = "yes";
        const figure = box.matches("figure");  // it has its role, and where it has a caption its name
        if (!figure) box.setAttribute("role", "group");
        if (!box.hasAttribute("aria-label") && !(figure && box.querySelector("figcaption"))) box.setAttribute("aria-label", (figure ? "Figure" : box.matches("pre") ? "Text" : "Table") + " that scrolls sideways");
      } else if (!wide && box.dataset.wide) {
        ["tabindex", "role", "aria-label", "data-wide"].forEach(function (n) { box.removeAttribute(n); });
      }
    });
  }

  function start() {
    named();
    reachable();
    let waiting = null;
    const later = function () { clearTimeout(waiting); waiting = setTimeout(reachable, 150); };
    window.addEventListener("resize", later);
    window.addEventListener("load", later);
    document.addEventListener("toggle", later, true);  // a fold was opened
    document.addEventListener("vc-drawn", later);  // a figure
    all(".vc-browser").forEach(function (box) { box.addEventListener("input", later); box.addEventListener("click", later); box.addEventListener("keyup", later); });
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
