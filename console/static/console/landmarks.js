// Adds the landmarks and labels that the theme's templates leave out, for screen readers.
(function () {
    "use strict";

    function label(element, name) {
        if (element && !element.getAttribute("aria-label")) element.setAttribute("aria-label", name);
    }

    function textOf(element) {
        return element ? element.textContent.trim() : "";
    }

    function landmarks() {
        const main = document.getElementById("main") || document.getElementById("page");
        if (main) main.setAttribute("role", "main");
        label(document.getElementById("nav-sidebar-inner"), "Sidebar");
    }

    // SimpleBar makes each scrollable box a region of the same name.
    function regions() {
        document.querySelectorAll(".simplebar-content-wrapper[role=region]").forEach((region, index) => {
            const inNavigation = region.closest("#nav-sidebar-apps");
            region.setAttribute("aria-label", inNavigation ? "Pages of the console" : `Scrollable content ${index + 1}`);
        });
    }

    function tables() {
        document.querySelectorAll("thead th").forEach(cell => {
            if (textOf(cell) || cell.querySelector("input, [aria-label]")) return;
            const replacement = document.createElement("td");
            for (const { name, value } of cell.attributes) if (name !== "scope") replacement.setAttribute(name, value);
            replacement.append(...cell.childNodes);
            cell.replaceWith(replacement);
        });
    }

    // A field of a table has the heading of its column, a widget's own controls the label of their field.
    function fields() {
        document.querySelectorAll("td input, td select, td textarea").forEach(field => {
            if (field.type === "hidden" || field.labels.length || field.getAttribute("aria-label")) return;
            const cell = field.closest("td");
            const table = field.closest("table");
            const heading = table && table.querySelector("thead tr") && table.querySelector("thead tr").cells[cell.cellIndex];
            const name = textOf(heading);
            if (name) label(field, name);
        });
        document.querySelectorAll(".selector select").forEach(select => {
            const of = document.querySelector(`label[for="${select.id.replace(/_(from|to)$/, "")}"]`);
            const side = select.id.endsWith("_from") ? "available" : "chosen";
            if (!textOf(select.labels[0])) label(select, `${textOf(of) || select.title || select.name}, ${side}`);
        });
        // A name needs a role.
        document.querySelectorAll(".selector span[aria-label]:not([role])").forEach(icon => icon.setAttribute("role", "img"));
        document.querySelectorAll("select.select2-hidden-accessible").forEach(select => {
            const box = select.nextElementSibling && select.nextElementSibling.querySelector(".select2-selection");
            if (!box) return;
            const name = textOf(select.labels[0]) || select.getAttribute("aria-label") || select.name;
            for (const each of [box, ...box.querySelectorAll("[role=textbox]")]) {
                each.removeAttribute("aria-labelledby");
                label(each, name);
            }
        });
    }

    function all() {
        landmarks();
        regions();
        tables();
        fields();
    }

    document.addEventListener("DOMContentLoaded", all);
    // Widgets of Django and scroll bars of the theme are made on load as well: after them.
    window.addEventListener("load", () => setTimeout(all));
    document.addEventListener("htmx:afterSettle", all);
    document.addEventListener("formset:added", all);
})();
